"""Compare every file of a run, a checkpoint, an export or prepared data with what was written.

    dsv3 verify runs/v3_tiny hf/v3_tiny data/pystdlib-2048

Exit codes: 0 all is as it was written, 2 something is not, each on a line of its own.
"""

import argparse
import sys

INTERRUPTED = "interrupted"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", nargs="+", metavar="DIR")


def run(options: argparse.Namespace) -> int:
    from dsv3_mtp.runs.verify import verify

    worst = 0
    for folder in options.folder:
        try:
            problems = verify(folder)
        except (ValueError, OSError) as error:
            problems = [str(error)]
        if problems:
            print("\n".join(problems), file=sys.stderr)
            worst = 2
        else:
            print(f"{folder}: as it was written")
    return worst
