"""The digest that tells a damaged file from the one that was written.

CRC-32: it finds every flipped bit, every burst of up to 32 bits, and other damage but for one in
four billion; zlib computes it at some 3 GB/s, more than a disk writes. It is no protection against
a person who changes file and digest.
"""

import zlib
from pathlib import Path

BLOCK = 2**22


class Digest:
    """Of bytes that come piece by piece."""

    def __init__(self) -> None:
        self._value = 0

    def update(self, piece: bytes | memoryview) -> None:
        self._value = zlib.crc32(piece, self._value)

    def __str__(self) -> str:
        return f"crc32:{self._value:08x}"


def file_digest(path: Path) -> str:
    """Raises OSError: the file cannot be read."""
    digest = Digest()
    block = memoryview(bytearray(BLOCK))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(block):
            digest.update(block[:count])
    return str(digest)


def difference(path: Path, recorded: str) -> str | None:
    """What is wrong with the content of a file; None: it is what was written."""
    try:
        found = file_digest(path)
    except OSError as error:
        return f"{path.name}: cannot be read ({error.strerror})"
    if found == recorded:
        return None
    return f"{path.name}: is not what was written ({found}, recorded was {recorded})"
