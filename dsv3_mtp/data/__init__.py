"""Data: text to memory-mapped token shards, or generated tasks; windows of them in a resumable order. numpy only."""
