"""One safetensors file, read and written one tensor, or one range of a tensor, at a time.

The format (huggingface/safetensors): 8 bytes little-endian header size, a JSON header {name:
{dtype, shape, data_offsets}}, then the data. Read here rather than through the library for three
reasons: a streaming writer never holds a file, a plain read leaves no mapped pages in memory, and
truncation is found without touching the data.
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

from dsv3_mtp.files.atomic import naming

DTYPES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


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
        """Fills `flat`, contiguous on the CPU and of the stored type, with the elements from
        `first` on.

        Raises:
            OSError: the file ends before.
        """
        with self.file.open("rb", buffering=0) as file:
            file.seek(self.start + first * flat.itemsize)
            view = memoryview(flat.view(torch.uint8).numpy().data)
            while view:
                count = file.readinto(view)  # one call reads 2 GiB at most
                if not count:
                    raise OSError(f"{self.file} is cut off")
                view = view[count:]


def read_header(path: Path) -> tuple[dict[str, Any], int, int]:
    """Entries, offset of the data, size of the file.

    Raises:
        OSError, ValueError: no such file, or no safetensors file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
        if 8 + length > size:
            raise ValueError(f"cut off: {size:,} bytes, its header alone is longer")
        header = json.loads(file.read(length))
    if not isinstance(header, dict):
        raise ValueError("no safetensors header")
    header.pop("__metadata__", None)
    return header, 8 + length, size


def place_of(path: Path, value: dict[str, Any], data: int) -> Place:
    """An entry of `read_header`, whose data begins at `data`.

    Raises:
        ValueError, KeyError, TypeError: the entry is not one.
    """
    shape = tuple(int(size) for size in value["shape"])
    start, stop = value["data_offsets"]
    if not 0 <= start <= stop:
        raise ValueError(f"data_offsets {start} .. {stop}")
    found = Place(path, value["dtype"], shape, data + start, data + stop)
    if found.dtype in DTYPES and math.prod(shape) * DTYPES[found.dtype].itemsize != stop - start:
        raise ValueError(f"{stop - start} bytes for {found.dtype} {list(shape)}")
    return found


def write_file(path: Path, entries: list[Entry], tensors: Iterable[Tensor]) -> None:
    """Writes the tensors, which come in the order of `entries`, and flushes them to disk."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry in entries:
        span = [offset, offset := offset + entry.size]
        header[entry.name] = {
            "dtype": NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": span,
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data starts at a multiple of 8
    stream = iter(tensors)
    with naming(path), path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for entry in entries:
            tensor = next(stream)
            if (tensor.dtype, tuple(tensor.shape)) != (entry.dtype, entry.shape):
                raise RuntimeError(f"{entry}: got {tensor.dtype} {tuple(tensor.shape)}")
            file.write(tensor.contiguous().view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())
