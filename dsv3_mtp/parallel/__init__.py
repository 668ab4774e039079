"""Everything that knows DeepSpeed: start and stop of the processes, the engine and its JSON. Its only importer."""
