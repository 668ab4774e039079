"""safetensors on disk, read and written one tensor at a time; every fault of a folder's files in one list.

The format (huggingface/safetensors): 8 bytes little-endian header size, a JSON header {name: {dtype, shape,
data_offsets}}, then the data. Read here rather than through the library for three reasons: a streaming writer never
holds a shard, a plain read leaves no mapped pages in memory, and truncation is found without touching the data.
"""

import json
import math
import os
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F8_E4M3": torch.float8_e4m3fn}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
SHARD_BYTES = 5_000_000_000


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


class Checkpoint:
    """The tensors of a folder. `problems` lists what is wrong with its files; only then is reading a tensor safe."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.places: dict[str, Place] = {}
        self.problems: list[tuple[str, str]] = []
        weight_map = self._index()
        files = sorted(set(weight_map.values())) or sorted(path.name for path in folder.glob("*.safetensors"))
        if not files:
            self.problems.append((str(folder), f"holds neither {INDEX} nor *.safetensors"))
        for name in files:
            self._add(folder / name)
        readable = {place.file.name for place in self.places.values()}
        for tensor, file in weight_map.items():
            if tensor not in self.places and file in readable:
                self.problems.append((tensor, f"{INDEX} puts it into {file}, which lacks it"))
        if weight_map:
            for tensor in self.places.keys() - weight_map.keys():
                self.problems.append((tensor, f"in {self.places[tensor].file.name}, but not in {INDEX}"))

    def read(self, name: str) -> Tensor:
        place = self.places[name]
        raw = torch.empty(place.stop - place.start, dtype=torch.uint8)
        with place.file.open("rb", buffering=0) as file:
            file.seek(place.start)
            view = memoryview(raw.numpy().data)
            while view and (count := file.readinto(view)):  # one call reads 2 GiB at most
                view = view[count:]
        return raw.view(DTYPES[place.dtype]).view(place.shape)

    def _index(self) -> dict[str, str]:
        path = self.folder / INDEX
        if not path.is_file():
            return {}
        try:
            weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
            return {str(key): Path(value).name for key, value in weight_map.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            self.problems.append((INDEX, f"not an index of safetensors files ({type(error).__name__}: {error})"))
            return {}

    def _add(self, path: Path) -> None:
        try:
            header, data, size = _read_header(path)
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            self.problems.append((path.name, reason))
            return
        for name, value in header.items():
            try:
                place = _place(path, value, data)
            except (ValueError, KeyError, TypeError) as error:
                self.problems.append((name, f"bad entry in the header of {path.name} ({error})"))
                continue
            if name in self.places:
                self.problems.append((name, f"in {self.places[name].file.name} and again in {path.name}"))
            elif place.stop > size:
                self.problems.append((name, f"cut off: {path.name} has {size:,} bytes, it ends at {place.stop:,}"))
            self.places.setdefault(name, place)


def _read_header(path: Path) -> tuple[dict[str, Any], int, int]:
    """Entries, offset of the data, size of the file."""
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


def _place(path: Path, value: dict[str, Any], data: int) -> Place:
    shape = tuple(int(size) for size in value["shape"])
    start, stop = value["data_offsets"]
    if not 0 <= start <= stop:
        raise ValueError(f"data_offsets {start} .. {stop}")
    place = Place(path, value["dtype"], shape, data + start, data + stop)
    if place.dtype in DTYPES and math.prod(shape) * DTYPES[place.dtype].itemsize != stop - start:
        raise ValueError(f"{stop - start} bytes for {place.dtype} {list(shape)}")
    return place


def write_checkpoint(folder: Path, entries: list[Entry], tensors: Iterable[Tensor], *, shard_bytes: int) -> None:
    """Writes model-0000i-of-0000n.safetensors and the index. The bytes depend on the arguments alone.

    `tensors` yields the tensors of `entries`, in that order; a shard closes before the entry that would take it over
    `shard_bytes`.
    """
    shards: list[list[Entry]] = [[]]
    for entry in entries:
        if shards[-1] and sum(e.size for e in shards[-1]) + entry.size > shard_bytes:
            shards.append([])
        shards[-1].append(entry)
    stream = iter(tensors)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= {entry.name: name for entry in shard}
        _write_file(folder / name, shard, stream)
    index = {"metadata": {"total_size": sum(entry.size for entry in entries)}, "weight_map": weight_map}
    write_json(folder / INDEX, index)


def _write_file(path: Path, entries: list[Entry], stream: Iterator[Tensor]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry in entries:
        span = [offset, offset := offset + entry.size]
        header[entry.name] = {"dtype": NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": span}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data starts at a multiple of 8
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for entry in entries:
            tensor = next(stream)
            if (tensor.dtype, tuple(tensor.shape)) != (entry.dtype, entry.shape):
                raise RuntimeError(f"{entry}: got {tensor.dtype} {tuple(tensor.shape)}")
            file.write(tensor.contiguous().view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
