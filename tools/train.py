"""`dsv3 train`, from a clone: `deepspeed tools/train.py --config configs/v3_tiny.yaml`."""

import sys

from dsv3_mtp.cli.command import run

if __name__ == "__main__":
    sys.exit(run("train"))
