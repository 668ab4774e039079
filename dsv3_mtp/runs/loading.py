"""What a run folder holds, read without DeepSpeed: for training, decoding, export and analysis."""

import json
import re
from pathlib import Path

from dsv3_mtp.config import Config
from dsv3_mtp.files.format import check_format
from dsv3_mtp.runs.fragments import AVERAGE, Fragments

# written last: the step, DeepSpeed's counters, and the size of every file of a checkpoint
COMPLETE = "COMPLETE.json"
IMPORTED = "weights"  # folder of an imported run, in DeepSeek-V3's layout


def checkpoints(root: Path) -> list[Path]:
    """The folders root/global_step{N}, complete or not, in the order of their steps."""
    found = [
        path for path in root.glob("global_step*/") if re.fullmatch(r"global_step\d+", path.name)
    ]
    return sorted(found, key=lambda path: int(path.name.removeprefix("global_step")))


def is_complete(checkpoint: Path) -> bool:
    """COMPLETE.json is there and every file that it lists has its size.

    Raises:
        ValueError: the checkpoint is of a newer format.
    """
    try:
        complete = json.loads((checkpoint / COMPLETE).read_text())
        files = complete["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    check_format(complete, checkpoint / COMPLETE)
    try:
        return all((checkpoint / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def newest_checkpoint(root: Path) -> Path | None:
    """The complete checkpoint of the highest step, None if there is none."""
    return next((path for path in reversed(checkpoints(root)) if is_complete(path)), None)


def newest_weights(run: Path, *, ema: bool = False) -> Fragments | None:
    """The weights in a run's newest complete checkpoint, or their moving average; None if there is
    no checkpoint.

    Raises:
        ValueError: ema, and the run has no average; or the checkpoint is damaged or of another
            format.
    """
    newest = newest_checkpoint(run / "checkpoints")
    stored = None if newest is None else Fragments(newest, state=AVERAGE if ema else None)
    if ema and (stored is None or not stored.has(AVERAGE)):
        raise ValueError(
            f"{run}: no average of the weights there; train "
            "it with train.ema_decay, or leave --ema out"
        )
    return stored


def tokenizer_of(config: Config, run: Path) -> Path | None:
    """tokenizer.json of a run: the imported one, else that of its data (a path relative to where
    training started).
    """
    corpora = [Path(entry.path) for entry in config.data.entries]
    runs = Path(config.run.dir)
    started = [*run.resolve().parents][: 1 + (1 if runs.is_absolute() else len(runs.parts))][-1]
    places = [run / IMPORTED, *corpora, *(started / corpus for corpus in corpora)]
    return next(
        (place / "tokenizer.json" for place in places if (place / "tokenizer.json").is_file()), None
    )
