"""The version of what a run folder holds: COMPLETE.json and state.json name it, and with them all
files of their checkpoint.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

# 1: the first that names itself; files without a version are read as it. Count up when a key or a
# tensor changes its meaning, and read the older meanings, or refuse them with the remedy.
FORMAT = 1


def check_format(content: Mapping[str, Any], path: Path) -> None:
    """Raises ValueError: the file is of a newer version of dsv3_mtp, which this one cannot read."""
    version = content.get("format", 1)
    if not isinstance(version, int) or version > FORMAT:
        raise ValueError(
            f"{path}: format {version}, written by a newer dsv3_mtp; this one reads up to format "
            f"{FORMAT}: go on with the newer version, or choose another run.name"
        )
