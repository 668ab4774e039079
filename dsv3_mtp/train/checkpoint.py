"""Checkpoints that a kill at any moment cannot break, and that any layout of ranks can continue.

    checkpoints/latest            name of the newest complete folder
    checkpoints/global_step{N}/   shard_rank{r}.safetensors and index.json (fragments.py): every rank writes what it
                                  holds; state.json; and, last of all, COMPLETE.json

No state of a random generator: after its start, training draws no random numbers.

A folder counts only when its COMPLETE.json exists and every file listed there has its size. Files
are flushed to disk before that.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dsv3_mtp.files.atomic import naming, write_json, write_text
from dsv3_mtp.files.format import FORMAT, check_format
from dsv3_mtp.parallel.average import WeightAverage
from dsv3_mtp.parallel.engine import Engine
from dsv3_mtp.parallel.launch import on_all, on_main
from dsv3_mtp.parallel.placement import Held, held, restoring
from dsv3_mtp.runs.fragments import (
    AVERAGE,
    INDEX,
    Fragment,
    Fragments,
    damaged,
    merge_index,
    write_fragments,
)
from dsv3_mtp.runs.loading import COMPLETE, checkpoints, is_complete

COUNTERS = ("global_steps", "global_samples")  # of DeepSpeed: what it counts by itself


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
        for mine in held(engine)
        if mine.share[0] < mine.share[1]
    ]
    parts: list[Any] = [None] * world.size
    part = on_all(world, lambda: write_fragments(folder, world.rank, fragments))
    dist.gather_object(part, parts if world.is_main else None)
    counters = {name: getattr(engine.engine, name) for name in COUNTERS}
    complete = {"step": step, "counters": counters}
    on_main(world, lambda: _commit(folder, merge_index(parts), state, complete, keep))
    return folder


def _begin(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)  # what a killed save left behind
    folder.mkdir(parents=True)


def _fragment(mine: Held, optimizer: Any, averages: dict[str, torch.Tensor]) -> Fragment:
    share = slice(*mine.share)
    kept = optimizer.state.get(mine.flat, {})
    tensors = {
        key: value
        for key, value in kept.items()
        if getattr(value, "shape", None) == mine.flat.shape
    }
    scalars = {key: float(value) for key, value in kept.items() if key not in tensors}
    states = {key: mine.of(value)[share] for key, value in tensors.items()}
    states |= {AVERAGE: averages[mine.name]} if averages else {}
    return Fragment(
        mine.name, mine.shape, mine.start + share.start, mine.of(mine.flat)[share], states, scalars
    )


def _commit(
    folder: Path, index: dict[str, Any], state: dict[str, Any], complete: dict[str, Any], keep: int
) -> None:
    """Completes the folder that all ranks have written into, and deletes what is not kept."""
    root = folder.parent
    with naming(folder):
        (folder / INDEX).write_text(json.dumps(index))
        (folder / "state.json").write_text(json.dumps({"format": FORMAT} | state, indent=1))
    files = sorted(path for path in folder.iterdir() if path.is_file())
    for path in files:
        with path.open("rb") as handle:
            os.fsync(handle.fileno())
    complete |= {"format": FORMAT, "files": {path.name: path.stat().st_size for path in files}}
    write_json(folder / COMPLETE, complete)
    write_text(root / "latest", folder.name)
    usable = [path for path in checkpoints(root) if is_complete(path)]
    for old in set(checkpoints(root)) - {folder, *usable[-keep:]}:
        (old / COMPLETE).unlink(missing_ok=True)  # a half-deleted folder must not count as complete
        shutil.rmtree(old)


def read_state(folder: Path) -> dict[str, Any]:
    """The `state` given to `save`: progress, data position, clock, config.

    Raises:
        ValueError: the checkpoint is damaged, or of a newer format.
    """
    try:
        state = json.loads((folder / "state.json").read_text())
    except (OSError, ValueError) as error:
        raise damaged(folder, error) from error
    check_format(state, folder / "state.json")
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
    mine = [part for part in held(engine) if part.numel]
    different = [part.name for part in mine if stored.shapes.get(part.name) != part.shape]
    if different:
        raise ValueError(
            f"{folder}: of another model: {', '.join(different)} missing or of another shape"
        )
    with torch.no_grad(), restoring(engine):
        on_all(engine.world, lambda: _restore(mine, stored, engine.engine.optimizer, moments))
    for name, value in json.loads((folder / COMPLETE).read_text())["counters"].items():
        setattr(engine.engine, name, value)
    return [] if average is None else on_all(engine.world, lambda: average.load(stored))


def _restore(parts: list[Held], stored: Fragments, optimizer: Any, moments: torch.dtype) -> None:
    for mine in parts:
        start, stop = mine.start, mine.start + mine.numel
        mine.of(mine.flat).copy_(stored.read(mine.name, start, stop))
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
