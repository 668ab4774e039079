"""A run folder read without DeepSpeed: its newest checkpoint, or the weights that it was imported with."""

import json
from pathlib import Path

import torch
from torch import Tensor

from dsv3_mtp.config import Config, load_config
from dsv3_mtp.hf.load import empty_model, load_weights
from dsv3_mtp.model.causal_lm import DeepseekV3MTP

WEIGHTS = "weights"  # folder of an imported run, in DeepSeek-V3's layout


def load_run(run: str | Path) -> tuple[DeepseekV3MTP, Config, Path | None]:
    """A run's model on the CPU in eval mode and in the run's dtype, its config, and the path of its tokenizer.json.

    The newest complete checkpoint; for an imported run without one, the imported weights as training would start.

    Raises:
        ValueError: neither is there, or the weights do not fit the run's config.
    """
    run = Path(run)
    config = load_config(run / "config.yaml")
    model = empty_model(config.model, config.mtp, getattr(torch, config.train.dtype))
    newest = newest_checkpoint(run)
    if newest is not None:
        try:
            model.load_state_dict(read_state_dict(newest), strict=True)
        except RuntimeError as error:
            raise ValueError(f"{newest}: its weights do not fit {run / 'config.yaml'}: {error}") from None
    elif (run / WEIGHTS).is_dir():
        model.init_weights(config.run.seed)  # what the import does not have: a fresh MTP module
        load_weights(model, run / WEIGHTS)
    else:
        raise ValueError(f"{run}: no complete checkpoint in {run / 'checkpoints'}; train the run first")
    return model.eval(), config, tokenizer_of(run, config)


def newest_checkpoint(run: Path) -> Path | None:
    """The complete checkpoint of the highest step: COMPLETE.json exists and every file listed there has its size."""

    def is_complete(folder: Path) -> bool:
        try:
            files = json.loads((folder / "COMPLETE.json").read_text())["files"]
            return all((folder / name).stat().st_size == size for name, size in files.items())
        except (OSError, ValueError):
            return False

    folders = [path for path in (run / "checkpoints").glob("global_step*") if path.name[11:].isdecimal()]
    return max(filter(is_complete, folders), key=lambda path: int(path.name[11:]), default=None)


def read_state_dict(checkpoint: Path) -> dict[str, Tensor]:
    """Weights and router biases, mapped from the file rather than read (ZeRO 0 and 1 keep the whole model in one)."""
    file = checkpoint / "mp_rank_00_model_states.pt"
    return torch.load(file, mmap=True, map_location="cpu", weights_only=True)["module"]


def tokenizer_of(run: Path, config: Config) -> Path | None:
    """tokenizer.json of a run: the imported one, else that of its data (a path relative to where training started)."""
    corpora = [Path(entry.path) for entry in config.data.entries]
    started = run.resolve().parent.parent
    places = [run / WEIGHTS, *corpora, *(started / corpus for corpus in corpora)]
    return next((place / "tokenizer.json" for place in places if (place / "tokenizer.json").is_file()), None)
