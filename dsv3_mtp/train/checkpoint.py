"""Checkpoints that a kill at any moment cannot break, and that any layout of ranks can continue.

    checkpoints/latest            name of the newest complete folder
    checkpoints/global_step{N}/   shard_rank{r}.safetensors and index.json (fragments.py), of every
                                  rank what it has; state.json; and, last of all, COMPLETE.json

No state of a random generator: after its start, training draws no random numbers.

A folder counts only when its COMPLETE.json exists and every file listed there has its size. Files
are flushed to disk before that. Their digests, computed as they are written, stand there too: a
start that resumes compares them, and takes the checkpoint before one that differs.
"""

import json
import os
import shutil
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any, NotRequired

import torch
import torch.distributed as dist
from pydantic import with_config
from typing_extensions import TypedDict

from dsv3_mtp.files.atomic import naming_file, sync, write_json, write_text
from dsv3_mtp.files.checked import OPEN, read_json
from dsv3_mtp.files.digest import file_digest
from dsv3_mtp.files.format import FORMAT, check_format
from dsv3_mtp.files.fragments import (
    AVERAGE,
    INDEX,
    Fragment,
    Fragments,
    merge_index,
    remedy,
    shard_name,
    write_fragments,
)
from dsv3_mtp.files.run_folder import (
    COMPLETE,
    STATE,
    Reached,
    checkpoints,
    differences,
    is_complete,
    read_complete,
)
from dsv3_mtp.hf.load import is_finite
from dsv3_mtp.parallel.average import WeightAverage
from dsv3_mtp.parallel.engine import Engine
from dsv3_mtp.parallel.launch import World, on_all, on_main
from dsv3_mtp.parallel.placement import TensorShard, restoring, tensor_shards
from dsv3_mtp.precision.stored import is_codes

COUNTERS = ("global_steps", "global_samples")  # of DeepSpeed, which counts them


@with_config(OPEN)
class SamplerState(TypedDict):
    """What `Sampler.load_state_dict` reads beside the identity of its stream."""

    samples: int
    counts: list[int]


@with_config(OPEN)
class Seconds(TypedDict):
    """Of a `Clock`."""

    seconds: float


@with_config(OPEN)
class SavedState(Reached):
    """state.json."""

    config: dict[str, Any]
    sampler: SamplerState
    clock: Seconds
    layout: str
    clipped: NotRequired[dict[str, tuple[int, int]]]


def save(
    engine: Engine,
    root: Path,
    *,
    step: int,
    state: dict[str, Any],
    keep: int,
    average: WeightAverage | None,
) -> Path:
    """Writes `root/global_step{step}` from all ranks, then prunes to the newest `keep`. `state` is
    rank 0's.

    Raises:
        ValueError: some rank could not write its files, or rank 0 not complete the folder.
    """
    folder, world = root / f"global_step{step}", engine.world
    if is_complete(folder):
        return folder
    on_main(world, lambda: _begin(folder))
    optimizer = engine.engine.optimizer
    averages = {} if average is None else average.values
    fragments = [
        _fragment(mine, optimizer, averages)
        for mine in tensor_shards(engine)
        if mine.share[0] < mine.share[1]
    ]
    parts: list[Any] = [None] * world.size
    part = on_all(world, lambda: write_fragments(folder, world.rank, fragments))
    dist.gather_object(part, parts if world.is_main else None)
    counters = {name: getattr(engine.engine, name) for name in COUNTERS}
    complete = {"step": step, "counters": counters}
    on_main(world, lambda: _commit(folder, parts, state, complete, keep))
    return folder


def _begin(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)  # what a killed save left behind
    folder.mkdir(parents=True)


def _fragment(mine: TensorShard, optimizer: Any, averages: dict[str, torch.Tensor]) -> Fragment:
    share = slice(*mine.share)
    kept = optimizer.state.get(mine.flat, {})
    tensors = {
        key: value
        for key, value in kept.items()
        if getattr(value, "shape", None) == mine.flat.shape
    }
    scalars = {key: float(value) for key, value in kept.items() if key not in tensors}
    states = {key: mine.of(value)[share] for key, value in tensors.items()}
    states |= {AVERAGE: averages[mine.name]} if mine.name in averages else {}
    values = mine.of(mine.flat)[share]
    if is_codes(values):
        values = values.view(torch.float8_e4m3fn)
    return Fragment(mine.name, mine.shape, mine.start + share.start, values, states, scalars)


def _commit(
    folder: Path,
    parts: list[tuple[list[dict[str, Any]], str]],
    state: dict[str, Any],
    complete: dict[str, Any],
    keep: int,
) -> None:
    """Completes the folder that all ranks have written into, and deletes what is not kept.

    parts: what `write_fragments` returned to each rank.
    """
    root = folder.parent
    with naming_file(folder):
        (folder / INDEX).write_text(json.dumps(merge_index(part for part, _ in parts)))
        (folder / STATE).write_text(json.dumps({"format": FORMAT} | state, indent=1))
    digests = {shard_name(rank): digest for rank, (_, digest) in enumerate(parts)}
    digests |= {name: file_digest(folder / name) for name in (INDEX, STATE)}
    files = sorted(path for path in folder.iterdir() if path.is_file())
    # Before COMPLETE.json: the content, and the names of the files and of the folders around them.
    for path in [*files, folder, *[*folder.parents][:4]]:
        sync(path)
    sizes = {path.name: path.stat().st_size for path in files}
    complete |= {"format": FORMAT, "files": sizes, "digests": digests}
    write_json(folder / COMPLETE, complete)
    write_text(root / "latest", folder.name)
    usable = [path for path in checkpoints(root) if is_complete(path)]
    for old in set(checkpoints(root)) - {folder, *usable[-keep:]}:
        (old / COMPLETE).unlink(missing_ok=True)  # a half-deleted folder must not count as complete
        shutil.rmtree(old)


def first_sound(world: World, newest_first: list[Path]) -> tuple[Path | None, list[str]]:
    """The first of these complete checkpoints whose content is what was written, and what to tell
    the user.

    The ranks share the files of each. A damaged one is set aside, so that its step is saved again.

    Raises:
        ValueError: all are damaged.
    """
    damaged: dict[Path, str] = {}
    for folder in newest_first:
        share = partial(differences, folder, rank=world.rank, world_size=world.size)
        found: list[Any] = [None] * world.size
        dist.all_gather_object(found, on_all(world, share))
        problems = [text for texts in found for text in texts]
        if not problems:
            on_main(world, lambda: _set_aside(damaged))
            return folder, [
                f"{text}; not used, and kept as {_aside(old).name}" for old, text in damaged.items()
            ]
        damaged[folder] = f"{folder}: damaged ({'; '.join(problems)})"
    if damaged:
        last = "no other checkpoint is left: start again under another run.name"
        raise ValueError("\n".join([*damaged.values(), last]))
    return None, []


def _aside(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.damaged")


def _set_aside(folders: Iterable[Path]) -> None:
    for folder in folders:
        shutil.rmtree(_aside(folder), ignore_errors=True)
        os.replace(folder, _aside(folder))


def read_state(folder: Path) -> SavedState:
    """The `state` given to `save`: progress, data position, clock, config.

    Raises:
        ValueError: the checkpoint is damaged, or of a newer format.
    """
    check_format(read_json(folder / STATE, dict[str, Any], remedy(folder)), folder / STATE)
    state = read_json(folder / STATE, SavedState, remedy(folder))
    position = state["sampler"]
    if min(state["step"], state["tokens"], *position["counts"], position["samples"]) < 0:
        raise ValueError(f"{folder / STATE}: damaged (a count < 0); {remedy(folder)}")
    if sum(position["counts"]) != position["samples"]:
        raise ValueError(
            f"{folder / STATE}: damaged (sampler.counts {position['counts']} are not "
            f"{position['samples']} samples); {remedy(folder)}"
        )
    return state


def load(
    engine: Engine, folder: Path, *, moments: torch.dtype, average: WeightAverage | None
) -> list[str]:
    """Restores model, router biases, optimizer and average in the layout of this run, whatever
    layout wrote them.

    Returns what the user should know.

    Raises:
        ValueError: the checkpoint is damaged, of another format, or of another model.
    """
    stored = Fragments(folder)
    mine = [part for part in tensor_shards(engine) if part.numel]
    different = [part.name for part in mine if stored.shapes.get(part.name) != part.shape]
    if different:
        raise ValueError(
            f"{folder}: of another model: {', '.join(different)} missing or of another shape"
        )
    with torch.no_grad(), restoring(engine):
        on_all(engine.world, lambda: _restore(mine, stored, engine.engine.optimizer, moments))
    counters = read_complete(folder).get("counters", {})
    for name in COUNTERS:
        setattr(engine.engine, name, counters.get(name, 0))
    return [] if average is None else on_all(engine.world, lambda: average.load(stored))


def _restore(
    parts: list[TensorShard], stored: Fragments, optimizer: Any, moments: torch.dtype
) -> None:
    for mine in parts:
        start, stop = mine.start, mine.start + mine.numel
        weights = stored.read(mine.name, start, stop)
        if is_codes(mine.flat):
            weights = weights.view(torch.uint8)
        elif not is_finite(weights):
            raise ValueError(f"{stored.folder}: {mine.name} holds nan or infinity")
        mine.of(mine.flat).copy_(weights)
        about = stored.index[mine.name]
        states = [key for key in about["states"] if key != AVERAGE]
        if not states:
            continue
        kept = optimizer.state[mine.flat]
        for key in states:
            if key not in kept:  # not made before the first step
                kept[key] = torch.zeros_like(mine.flat, dtype=moments, requires_grad=False)
            mine.of(kept[key]).copy_(stored.read(mine.name, start, stop, state=key))
        for key, value in about["scalars"].items():  # as torch's fused AdamW keeps them
            kept[key] = torch.tensor(value, dtype=torch.float32, device=mine.flat.device)
