"""The tensors of a checkpoint, cut into ranges as the ranks held them, and read in any other way.

    shard_rank{r}.safetensors   what rank r wrote, flat. NAME: a range of the values of tensor NAME
                                (float32 masters of what is trained; frozen parameters and buffers
                                in their own type, codes of a trunk in block-FP8 as F8_E4M3).
                                NAME/exp_avg, NAME/exp_avg_sq, ...: what the optimizer keeps for
                                the same range. NAME/ema: the average of the
                                weights (train.ema_decay).
    index.json                  {NAME: {"shape": [...], "states": ["exp_avg", ...],
                                        "scalars": {"step": 20.0},
                                        "ranges": [[start, stop, rank], ...]}}

Names and shapes are those of the unsharded model's state dict; ranges count elements of the
flattened tensor.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import with_config
from torch import Tensor
from typing_extensions import TypedDict

from dsv3_mtp.files.checked import OPEN, read_json
from dsv3_mtp.files.tensorfile import DTYPES, Entry, Place, read_places, write_file

INDEX = "index.json"
AVERAGE = "ema"  # the state that is the average of the weights


@with_config(OPEN)
class Stored(TypedDict):
    """A tensor in the index."""

    shape: list[int]
    states: list[str]
    scalars: dict[str, float]
    ranges: list[tuple[int, int, int]]  # start, stop, rank


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


def write_fragments(
    folder: Path, rank: int, fragments: Sequence[Fragment]
) -> tuple[list[dict[str, Any]], str]:
    """Writes this rank's shard; returns its part of the index, and the digest of the file."""
    tensors = {}
    for fragment in fragments:
        tensors[fragment.name] = fragment.values
        tensors |= {f"{fragment.name}/{key}": state for key, state in fragment.states.items()}
    entries = [Entry(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    stream = (tensor.cpu() for tensor in tensors.values())
    digest = write_file(folder / shard_name(rank), entries, stream)
    part = [
        {
            "name": fragment.name,
            "shape": list(fragment.shape),
            "states": sorted(fragment.states),
            "scalars": fragment.scalars,
            "range": [fragment.start, fragment.start + len(fragment.values), rank],
        }
        for fragment in fragments
    ]
    return part, digest


def merge_index(parts: Iterable[list[dict[str, Any]]]) -> dict[str, Any]:
    """The index of all shards. Raises RuntimeError: ranges do not make whole tensors, once each."""
    index: dict[str, Any] = {}
    for part in parts:
        for entry in part:
            about = {key: entry[key] for key in ("shape", "states", "scalars")}
            tensor = index.setdefault(entry["name"], about | {"ranges": []})
            if any(tensor[key] != value for key, value in about.items()):
                raise RuntimeError(f"{entry['name']}: ranks disagree: {tensor}, {about}")
            tensor["ranges"].append(entry["range"])
    for tensor in index.values():
        tensor["ranges"].sort()
    if problems := list(gaps(index)):
        raise RuntimeError("; ".join(problems))
    return index


def gaps(index: Mapping[str, Stored]) -> Iterator[str]:
    """What keeps an index from giving each element of each tensor exactly once."""
    for name, tensor in index.items():
        starts = [start for start, _, _ in tensor["ranges"]] + [math.prod(tensor["shape"])]
        stops = [0] + [stop for _, stop, _ in tensor["ranges"]]
        if starts != stops or min(tensor["shape"], default=1) < 0 or starts != sorted(starts):
            yield f"{name} {tensor['shape']}: not written once and wholly: {tensor['ranges']}"


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
        self.index = read_json(folder / INDEX, dict[str, Stored], remedy(folder))
        if problem := next(gaps(self.index), None):
            raise damaged(folder, ValueError(problem))
        self.shapes = {name: torch.Size(tensor["shape"]) for name, tensor in self.index.items()}
        self._headers: dict[int, dict[str, Place]] = {}

    def read(
        self, name: str, start: int = 0, stop: int | None = None, *, state: str | None = None
    ) -> Tensor:
        """(stop - start,) elements of the flattened tensor, or of the optimizer's `state` for
        it. A tensor without an average is its own.
        """
        state = state or self.state
        if state == AVERAGE and AVERAGE not in self.index[name]["states"]:
            state = None
        key = name if state is None else f"{name}/{state}"
        stop = math.prod(self.shapes[name]) if stop is None else stop
        try:
            ranges = self.index[name]["ranges"]
            overlapping = [part for part in ranges if part[0] < stop and start < part[1]]
            found = [(first, last, self._place(rank, key)) for first, last, rank in overlapping]
            dtype = found[0][2].dtype
            if dtype not in DTYPES:
                raise ValueError(f"{key}: has type {dtype}; supported are {', '.join(DTYPES)}")
            flat = torch.empty(stop - start, dtype=DTYPES[dtype])
            for first, last, place in found:
                if (place.shape, place.dtype) != ((last - first,), dtype):
                    raise ValueError(
                        f"{key}: {place.dtype} {list(place.shape)} in {place.file.name}, "
                        f"{INDEX} promises {last - first} of {dtype}"
                    )
                begin, end = max(first, start), min(last, stop)
                place.read_into(flat[begin - start : end - start], begin - first)
        except (OSError, ValueError) as error:
            raise damaged(self.folder, error) from error
        return flat

    def has(self, state: str) -> bool:
        """Some tensor has this state: all that learn, or none."""
        return any(state in about["states"] for about in self.index.values())

    def _place(self, rank: int, key: str) -> Place:
        if rank not in self._headers:
            path = self.folder / shard_name(rank)
            try:
                self._headers[rank] = read_places(path)
            except ValueError as error:
                raise ValueError(f"{path.name}: {error}") from None
            except OSError as error:
                raise ValueError(f"{path.name}: {error.strerror or error}") from None
        if key not in self._headers[rank]:
            raise ValueError(f"{shard_name(rank)} holds no {key}")
        return self._headers[rank][key]


def damaged(folder: Path, error: Exception) -> ValueError:
    what: object = error
    if isinstance(error, OSError) and error.filename:
        what = f"{error.filename}: {error.strerror}"
    return ValueError(f"{folder}: damaged ({what}); {remedy(folder)}")


def remedy(folder: Path) -> str:
    return f"delete {folder} to use the checkpoint before it"
