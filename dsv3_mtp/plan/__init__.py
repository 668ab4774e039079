"""What a layout of ranks costs: memory.py and parts.py; dryrun.py prints it."""
