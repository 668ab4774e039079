"""The tensors of a checkpoint, cut into ranges in whatever way the ranks held them, and read in any
other way.

    shard_rank{r}.safetensors   what rank r wrote, flat: NAME, a range of the values of tensor NAME (float32 masters of
                                what is trained; frozen parameters and buffers in their own type), and NAME/exp_avg,
                                NAME/exp_avg_sq, ..., what the optimizer keeps for the same range; NAME/ema, the
                                average of the weights (train.ema_decay)
    index.json                  {NAME: {"shape": [...], "states": ["exp_avg", ...], "scalars": {"step": 20.0},
                                        "ranges": [[start, stop, rank], ...]}}

Names and shapes are those of the unsharded model's state dict; ranges count elements of the
flattened tensor.
"""

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dsv3_mtp.files.tensorfile import DTYPES, Entry, Place, place_of, read_header, write_file

INDEX = "index.json"
AVERAGE = "ema"  # the state that is the average of the weights


class Fragment(NamedTuple):
    """A range of a tensor, as one rank writes it."""

    name: str
    shape: tuple[int, ...]  # of the whole tensor
    start: int
    values: Tensor  # (n,)
    states: dict[str, Tensor]  # (n,) each
    scalars: dict[str, float]


def shard_name(rank: int) -> str:
    return f"shard_rank{rank}.safetensors"


def write_fragments(folder: Path, rank: int, fragments: Sequence[Fragment]) -> list[dict[str, Any]]:
    """Writes this rank's shard; returns its part of the index, for `merge_index`."""
    tensors = {}
    for fragment in fragments:
        tensors[fragment.name] = fragment.values
        tensors |= {f"{fragment.name}/{key}": state for key, state in fragment.states.items()}
    entries = [Entry(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    write_file(folder / shard_name(rank), entries, (tensor.cpu() for tensor in tensors.values()))
    return [
        {
            "name": fragment.name,
            "shape": list(fragment.shape),
            "states": sorted(fragment.states),
            "scalars": fragment.scalars,
            "range": [fragment.start, fragment.start + len(fragment.values), rank],
        }
        for fragment in fragments
    ]


def merge_index(parts: Iterable[list[dict[str, Any]]]) -> dict[str, Any]:
    """The index of all shards.

    Raises:
        RuntimeError: the ranges do not make whole tensors, each element once.
    """
    index: dict[str, Any] = {}
    for part in parts:
        for entry in part:
            about = {key: entry[key] for key in ("shape", "states", "scalars")}
            tensor = index.setdefault(entry["name"], about | {"ranges": []})
            if any(tensor[key] != value for key, value in about.items()):
                raise RuntimeError(f"{entry['name']}: ranks disagree: {tensor}, {about}")
            tensor["ranges"].append(entry["range"])
    for name, tensor in index.items():
        tensor["ranges"].sort()
        starts = [start for start, _, _ in tensor["ranges"]] + [math.prod(tensor["shape"])]
        stops = [0] + [stop for _, stop, _ in tensor["ranges"]]
        if starts != stops:
            raise RuntimeError(
                f"{name} {tensor['shape']}: not written once and wholly: {tensor['ranges']}"
            )
    return index


class Fragments:
    """The tensors of a checkpoint folder; a read touches only what it asks for.

    state: what `read` gives when it is not told; None: the weights.

    Raises (also `read`):
        ValueError: the folder is damaged or of another format.
    """

    def __init__(self, folder: Path, *, state: str | None = None):
        self.folder, self.state = folder, state
        if not (folder / INDEX).is_file():
            raise ValueError(
                f"{folder}: no {INDEX} in it: written by an older "
                "version of dsv3_mtp in DeepSpeed's own format, which "
                "this one does not read; go on with that version, or choose another run.name"
            )
        try:
            self.index: dict[str, Any] = json.loads((folder / INDEX).read_text())
            self.shapes = {name: torch.Size(tensor["shape"]) for name, tensor in self.index.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise damaged(self.folder, error) from error
        self._headers: dict[int, dict[str, Place]] = {}

    def read(
        self, name: str, start: int = 0, stop: int | None = None, *, state: str | None = None
    ) -> Tensor:
        """(stop - start,) elements of the flattened tensor, or of the optimizer's `state` for
        it.
        """
        state = state or self.state
        key = name if state is None else f"{name}/{state}"
        stop = math.prod(self.shapes[name]) if stop is None else stop
        try:
            ranges = self.index[name]["ranges"]
            overlapping = [
                (first, last, rank) for first, last, rank in ranges if first < stop and start < last
            ]
            found = [(first, last, self._place(rank, key)) for first, last, rank in overlapping]
            flat = torch.empty(stop - start, dtype=DTYPES[found[0][2].dtype])
            for first, last, place in found:
                begin, end = max(first, start), min(last, stop)
                place.read_into(flat[begin - start : end - start], begin - first)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise damaged(self.folder, error) from error
        return flat

    def has(self, state: str) -> bool:
        """Every tensor has this state."""
        return all(state in about["states"] for about in self.index.values())

    def _place(self, rank: int, key: str) -> Place:
        if rank not in self._headers:
            path = self.folder / shard_name(rank)
            header, data, size = read_header(path)
            places = {name: place_of(path, value, data) for name, value in header.items()}
            if (stop := max(place.stop for place in places.values())) != size:
                raise ValueError(f"{path.name} has {size:,} bytes, its header promises {stop:,}")
            self._headers[rank] = places
        return self._headers[rank][key]


def damaged(folder: Path, error: Exception) -> ValueError:
    reason = f"{type(error).__name__}: {error}"
    return ValueError(
        f"{folder}: damaged ({reason}); delete this folder to use the checkpoint before it"
    )
