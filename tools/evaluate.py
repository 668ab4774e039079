"""`dsv3 evaluate`, from a clone."""

import os
import sys

from dsv3_mtp.cli.command import run

if __name__ == "__main__":
    # tasks of lm-evaluation-harness import a package that is named like this file
    here = os.path.dirname(os.path.realpath(__file__))
    sys.path = [path for path in sys.path if os.path.realpath(path or ".") != here]
    sys.exit(run("evaluate"))
