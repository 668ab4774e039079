"""`python -m dsv3_mtp COMMAND`: the same as `dsv3 COMMAND`."""

import sys

from dsv3_mtp.cli.command import main

if __name__ == "__main__":
    sys.exit(main())
