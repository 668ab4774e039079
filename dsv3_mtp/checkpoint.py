"""Checkpoints that a kill at any moment cannot break.

    checkpoints/latest            name of the newest complete folder
    checkpoints/global_step{N}/   DeepSpeed's files (model, router biases, optimizer), state.json, rng_rank{r}.pt,
                                  and, last of all, COMPLETE.json

A folder counts only when its COMPLETE.json exists and every file listed there has its size: DeepSpeed's own `latest`
may name a folder that another rank was still writing. Files are flushed to disk before that.
"""

import json
import os
import pickle
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from dsv3_mtp.loading import COMPLETE, checkpoints, is_complete
from dsv3_mtp.metrics import replacing
from dsv3_mtp.parallel.engine import Engine


def save(engine: Engine, root: Path, *, step: int, state: dict[str, Any], keep: int) -> Path:
    """Writes `root/global_step{step}` from all ranks, then prunes to the newest `keep`. `state` is rank 0's."""
    folder, main = root / f"global_step{step}", engine.world.is_main
    if is_complete(folder):
        return folder
    if main:
        shutil.rmtree(folder, ignore_errors=True)  # what a killed save left behind
        folder.mkdir(parents=True)
    dist.barrier()
    torch.save(_rng_state(), folder / f"rng_rank{engine.world.rank}.pt")
    engine.engine.save_checkpoint(str(root), tag=folder.name, save_latest=False)
    dist.barrier()
    if main:
        (folder / "state.json").write_text(json.dumps(state, indent=1))
        files = sorted(path for path in folder.iterdir() if path.is_file())
        for path in files:
            with path.open("rb") as handle:
                os.fsync(handle.fileno())
        sizes = {path.name: path.stat().st_size for path in files}
        complete = {
            "step": step,
            "world_size": engine.world.size,
            "zero_stage": _stage(engine),
            "files": sizes,
        }
        for path, text in (
            (folder / COMPLETE, json.dumps(complete, indent=1)),
            (root / "latest", folder.name),
        ):
            with replacing(path) as temporary:
                temporary.write_text(text)
        usable = [path for path in checkpoints(root) if is_complete(path)]
        for old in set(checkpoints(root)) - {folder, *usable[-keep:]}:
            (old / COMPLETE).unlink(missing_ok=True)  # a half-deleted folder must not count as complete
            shutil.rmtree(old)
    dist.barrier()
    return folder


def incomplete(root: Path) -> list[Path]:
    """Checkpoints that a kill or damage left unusable."""
    return [folder for folder in checkpoints(root) if not is_complete(folder)]


def read_state(folder: Path) -> dict[str, Any]:
    """The `state` given to `save`: progress, data position, clock, config."""
    return json.loads((folder / "state.json").read_text())


def load(engine: Engine, folder: Path) -> None:
    """Restores model, router biases, optimizer and this rank's random generators.

    Raises:
        ValueError: the checkpoint is damaged, or of another number of ranks or another ZeRO stage.
    """
    made = json.loads((folder / COMPLETE).read_text())
    here = {"world_size": engine.world.size, "zero_stage": _stage(engine)}
    different = [f"{key} {made[key]}, this run has {value}" for key, value in here.items() if made[key] != value]
    if different:
        raise ValueError(
            f"{folder}: written with {'; '.join(different)}: resume with the same layout, or use a new run.name"
        )
    try:  # DeepSpeed unpickles its files, as is done here: load only what you trust
        path, _ = engine.engine.load_checkpoint(str(folder.parent), tag=folder.name)
        rng_state = torch.load(folder / f"rng_rank{engine.world.rank}.pt", weights_only=False)
    except (OSError, EOFError, KeyError, RuntimeError, pickle.UnpicklingError) as error:
        raise ValueError(f"{folder}: damaged ({error}); delete this folder to use the checkpoint before it") from error
    if path is None:
        raise ValueError(f"{folder}: damaged; delete this folder to use the checkpoint before it")
    _set_rng_state(rng_state)


def _stage(engine: Engine) -> int:
    return engine.engine.zero_optimization_stage()


def _rng_state() -> dict[str, Any]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {
        "torch": torch.get_rng_state(),
        "cuda": cuda,
        "numpy": np.random.get_state(),
        "python": random.getstate(),
    }


def _set_rng_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
    np.random.set_state(state["numpy"])
    random.setstate(state["python"])
