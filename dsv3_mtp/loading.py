"""A trained model from its run folder, without DeepSpeed: for decoding, export and analysis."""

import json
import re
from pathlib import Path
from typing import NamedTuple

import torch

from dsv3_mtp.config import Config, load_config
from dsv3_mtp.model.causal_lm import DeepseekV3MTP

WEIGHTS = "mp_rank_00_model_states.pt"  # DeepSpeed's file with the whole model, under ZeRO 0 and 1


class LoadedRun(NamedTuple):
    """`tokenizer` is the tokenizer.json of the training data, None where the data has none (Megatron files)."""

    model: DeepseekV3MTP
    config: Config
    tokenizer: Path | None


def load_run(folder: str | Path) -> LoadedRun:
    """The newest complete checkpoint of runs/NAME on the CPU, in eval mode, in the dtype of the run.

    A bfloat16 run has bfloat16 weights here; its float32 masters stay in the optimizer's files.

    Raises:
        ValueError: no run there, no complete checkpoint, or weights that do not fit the run's config.
    """
    folder = Path(folder)
    if not (folder / "config.yaml").is_file():
        raise ValueError(f"{folder}: no config.yaml there; name the folder of a run, like runs/v3_tiny")
    config = load_config(folder / "config.yaml")
    checkpoint = newest_checkpoint(folder / "checkpoints")
    if checkpoint is None:
        raise ValueError(f"{folder}: no complete checkpoint there; train the run first, or further")
    # DeepSpeed's own loader unpickles anything; the tensors are all that is needed here.
    state = torch.load(checkpoint / WEIGHTS, map_location="cpu", weights_only=True, mmap=True)["module"]
    with torch.device("meta"):
        model = DeepseekV3MTP(config.model, config.mtp)
    try:
        model.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as error:
        detail = str(error).splitlines()[-1].strip()
        raise ValueError(f"{checkpoint}: its weights do not fit {folder / 'config.yaml'}: {detail}") from None
    return LoadedRun(model.requires_grad_(False).eval(), config, tokenizer_of(config, folder))


def newest_checkpoint(root: Path) -> Path | None:
    """The folder global_step{N} of the highest N whose COMPLETE.json agrees with its files, None if there is none."""

    def complete(path: Path) -> bool:
        try:
            files = json.loads((path / "COMPLETE.json").read_text())["files"]
            return all((path / name).stat().st_size == size for name, size in files.items())
        except (OSError, ValueError):
            return False

    steps = {int(match[1]): path for path in root.glob("*") if (match := re.fullmatch(r"global_step(\d+)", path.name))}
    return next((steps[step] for step in sorted(steps, reverse=True) if complete(steps[step])), None)


def tokenizer_of(config: Config, folder: Path) -> Path | None:
    """tokenizer.json of the (first) training corpus; its path is relative to where training was started."""
    data = Path(config.data.entries[0].path)
    for base in (Path(), folder.resolve().parent.parent):
        if (path := base / data / "tokenizer.json").is_file():
            return path
    return None
