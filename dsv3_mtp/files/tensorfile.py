"""One safetensors file, read and written one tensor, or one range of a tensor, at a time.

The format (huggingface/safetensors): 8 bytes little-endian header size, a JSON header {name:
{dtype, shape, data_offsets}}, then the data. The library judges the header. The data is read and
written here for two reasons: a streaming writer never holds a file, and a plain read leaves no
mapped pages in memory.
"""

import json
import math
import os
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dsv3_mtp.files.atomic import naming_file
from dsv3_mtp.files.checked import parse_json
from dsv3_mtp.files.digest import Digest

DTYPES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
LONGEST_HEADER = 100_000_000  # bytes, as in the library


class Entry(NamedTuple):
    """A tensor to be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Place(NamedTuple):
    """A tensor in a file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    def read(self) -> Tensor:
        """The tensor in its stored type."""
        flat = torch.empty(math.prod(self.shape), dtype=DTYPES[self.dtype])
        self.read_into(flat)
        return flat.view(self.shape)

    def read_into(self, flat: Tensor, first: int = 0) -> None:
        """Fills `flat`, contiguous, on the CPU, of the stored type, with the elements from `first`.
        Raises OSError: the file ends before.
        """
        with self.file.open("rb", buffering=0) as file:
            file.seek(self.start + first * flat.itemsize)
            view = memoryview(flat.view(torch.uint8).numpy().data)
            while view:
                count = file.readinto(view)  # one call reads 2 GiB at most
                if not count:
                    raise OSError(f"{self.file} is cut off")
                view = view[count:]


def read_places(path: Path) -> dict[str, Place]:
    """Where each tensor of a file lies. Reads the header only. Raises OSError, ValueError: no such
    file, or none that the safetensors library reads: cut off, not covered wholly or covered twice,
    sizes that are no sizes.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
        if 8 + length > size:
            raise ValueError(f"cut off: {size:,} bytes, its header alone is longer")
        if length > LONGEST_HEADER:
            raise ValueError(f"a header of {length:,} bytes, more than {LONGEST_HEADER:,}")
        header = parse_json(file.read(length), dict[str, Any])
    _ask_the_library(path, size)
    header.pop("__metadata__", None)
    places = {}
    for name, about in header.items():
        start, stop = (8 + length + offset for offset in about["data_offsets"])
        places[name] = Place(path, about["dtype"], tuple(about["shape"]), start, stop)
    return places


def _ask_the_library(path: Path, size: int) -> None:
    """Raises ValueError where the safetensors library refuses the header, whatever for."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np"):
            pass
    except SafetensorError as error:
        reason = str(error).removeprefix("Error while deserializing header: ")
        if "not fully covered" in reason:
            reason = f"cut off, or too long: {size:,} bytes are not those of its tensors"
        raise ValueError(reason) from None


def write_file(path: Path, entries: list[Entry], tensors: Iterable[Tensor]) -> str:
    """Writes and flushes the tensors, in the order of `entries`; returns the file's digest."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry in entries:
        about = {"dtype": NAMES[entry.dtype], "shape": list(entry.shape)}
        span = [offset, offset := offset + entry.size]
        header[entry.name] = about | {"data_offsets": span}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data starts at a multiple of 8
    stream = iter(tensors)
    with naming_file(path), path.open("wb") as file:
        head = struct.pack("<Q", len(text)) + text
        file.write(head)
        digest = Digest()
        digest.update(head)
        for entry in entries:
            tensor = next(stream)
            if (tensor.dtype, tuple(tensor.shape)) != (entry.dtype, entry.shape):
                raise RuntimeError(f"{entry}: got {tensor.dtype} {tuple(tensor.shape)}")
            data = tensor.contiguous().view(torch.uint8).numpy().data
            digest.update(data)
            file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return str(digest)
