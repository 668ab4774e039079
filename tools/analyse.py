"""`dsv3 analyse`, from a clone."""

import sys

from dsv3_mtp.cli.command import run

if __name__ == "__main__":
    sys.exit(run("analyse"))
