"""The command line: `dsv3 COMMAND`, a file for each command, and command.py around all of them.

A command's file has the docstring that `--help` prints, `add_options(parser)`, and `run(options)`,
which returns an exit code, or None for 0. It imports what it needs when it runs: `--help` and a
wrong option are answered without torch.
"""
