"""What a run folder holds, read without DeepSpeed: for training, decoding, export and analysis."""

import json
import re
from pathlib import Path

import torch
from torch import Tensor

from dsv3_mtp.config import Config

COMPLETE = "COMPLETE.json"  # written last: the step, the layout, and the size of every file of a checkpoint
WEIGHTS = "mp_rank_00_model_states.pt"  # DeepSpeed's file with the whole model, under ZeRO 0 and 1
IMPORTED = "weights"  # folder of an imported run, in DeepSeek-V3's layout


def checkpoints(root: Path) -> list[Path]:
    """The folders root/global_step{N}, complete or not, in the order of their steps."""
    found = [path for path in root.glob("global_step*") if re.fullmatch(r"global_step\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("global_step")))


def is_complete(checkpoint: Path) -> bool:
    """COMPLETE.json is there and every file that it lists has its size."""
    try:
        files = json.loads((checkpoint / COMPLETE).read_text())["files"]
        return all((checkpoint / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def newest_checkpoint(root: Path) -> Path | None:
    """The complete checkpoint of the highest step, None if there is none."""
    return next((path for path in reversed(checkpoints(root)) if is_complete(path)), None)


def read_state_dict(checkpoint: Path) -> dict[str, Tensor]:
    """Weights and router biases, mapped from the file rather than read.

    A bfloat16 run has bfloat16 weights here; its float32 masters stay in the optimizer's files.
    """
    # DeepSpeed's own loader unpickles anything; the tensors are all that is needed here.
    return torch.load(checkpoint / WEIGHTS, map_location="cpu", weights_only=True, mmap=True)["module"]


def tokenizer_of(config: Config, run: Path) -> Path | None:
    """tokenizer.json of a run: the imported one, else that of its data (a path relative to where training started)."""
    corpora = [Path(entry.path) for entry in config.data.entries]
    started = run.resolve().parent.parent
    places = [run / IMPORTED, *corpora, *(started / corpus for corpus in corpora)]
    return next((place / "tokenizer.json" for place in places if (place / "tokenizer.json").is_file()), None)
