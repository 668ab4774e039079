"""Compare every file of a run, a checkpoint, an export or prepared data with what was written.

    python tools/verify.py runs/v3_tiny hf/v3_tiny data/pystdlib-2048

Exit codes: 0 all is as it was written, 2 something is not, each on a line of its own.
"""

import argparse
import sys


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", nargs="+", metavar="DIR")
    options = parser.parse_args()
    from dsv3_mtp.runs.verify import verify

    worst = 0
    for folder in options.folder:
        try:
            problems = verify(folder)
        except (ValueError, OSError) as error:
            problems = [str(error)]
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130
        if problems:
            print("\n".join(problems), file=sys.stderr)
            worst = 2
        else:
            print(f"{folder}: as it was written")
    return worst


if __name__ == "__main__":
    sys.exit(main())
