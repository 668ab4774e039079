"""What a run folder holds, read without DeepSpeed: for training, decoding, export and analysis."""

import re
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any, NotRequired

from pydantic import Field, with_config
from typing_extensions import TypedDict

from dsv3_mtp.config import Config, load_config
from dsv3_mtp.files.checked import OPEN, read_json
from dsv3_mtp.files.digest import difference
from dsv3_mtp.files.format import check_format
from dsv3_mtp.files.fragments import AVERAGE, Fragments

# written last: the step, DeepSpeed's counters, and the size of every file of a checkpoint
COMPLETE = "COMPLETE.json"
STATE = "state.json"
IMPORTED = "weights"  # folder of an imported run, in DeepSeek-V3's layout
FileName = Annotated[str, Field(pattern=r"^\w[\w.-]*$")]  # in this folder


@with_config(OPEN)
class Complete(TypedDict):
    """COMPLETE.json."""

    files: dict[FileName, int]  # bytes
    digests: NotRequired[dict[FileName, str]]
    counters: NotRequired[dict[str, int]]


@with_config(OPEN)
class Reached(TypedDict):
    """How far a run is: the head of state.json."""

    step: int
    tokens: int


def checkpoints(root: Path) -> list[Path]:
    """The folders root/global_step{N}, complete or not, in the order of their steps."""
    steps = ((re.fullmatch(r"global_step(\d+)", path.name), path) for path in root.glob("*/"))
    return [path for _, path in sorted((int(step[1]), path) for step, path in steps if step)]


def is_complete(checkpoint: Path) -> bool:
    """Every file of COMPLETE.json has its size. Raises ValueError: it is of a newer format."""
    try:
        complete = read_complete(checkpoint)
    except ValueError:
        return False
    check_format(complete, checkpoint / COMPLETE)
    try:
        files = complete["files"].items()
        return all((checkpoint / name).stat().st_size == size for name, size in files)
    except OSError:
        return False


def read_complete(checkpoint: Path) -> Complete:
    """Raises ValueError: COMPLETE.json is missing or damaged."""
    return read_json(checkpoint / COMPLETE, Complete, f"delete {checkpoint}")


def read_reached(checkpoint: Path) -> Reached:
    """Raises ValueError: state.json is missing or damaged."""
    return read_json(checkpoint / STATE, Reached, f"delete {checkpoint}")


def newest_checkpoint(root: Path) -> Path | None:
    """The complete checkpoint of the highest step, None if there is none."""
    return next((path for path in reversed(checkpoints(root)) if is_complete(path)), None)


def differences(checkpoint: Path, *, rank: int = 0, world_size: int = 1) -> list[str]:
    """Files of a complete checkpoint, or this rank's share, whose content is not what was written.

    A checkpoint of a version that kept no digests has no differences.
    """
    recorded = sorted(read_complete(checkpoint).get("digests", {}).items())
    mine = recorded[rank::world_size]
    found = (difference(checkpoint / name, digest) for name, digest in mine)
    return [text for text in found if text is not None]


def newest_sound(root: Path) -> tuple[Path | None, list[str]]:
    """The newest complete checkpoint whose content is what was written, None if there is none; and
    what is wrong with newer ones.
    """
    notes = []
    for path in reversed(checkpoints(root)):
        if not is_complete(path):
            notes.append(f"{path} is incomplete: not used")
        elif problems := differences(path):
            notes.append(f"{path}: {'; '.join(problems)}; not used")
        else:
            return path, notes
    return None, notes


def newest_weights(run: Path, *, ema: bool = False) -> tuple[Fragments | None, list[str]]:
    """The weights in a run's newest sound checkpoint, or their moving average, None if there is no
    checkpoint; and what is wrong with newer ones. Raises ValueError: ema, and the run has no
    average; or no checkpoint is sound, or it is of another format.
    """
    newest, notes = newest_sound(run / "checkpoints")
    if newest is None and notes:
        raise ValueError("\n  ".join([f"{run}: no complete checkpoint there", *notes]))
    stored = None if newest is None else Fragments(newest, state=AVERAGE if ema else None)
    if ema and (stored is None or not stored.has(AVERAGE)):
        remedy = "train it with train.ema_decay, or leave --ema out"
        raise ValueError(f"{run}: no average of the weights there; {remedy}")
    return stored, notes


def start_weights(config: Config, run: Path) -> Path | None:
    """The folder, in DeepSeek-V3's layout, that a run without a checkpoint has its weights from:
    imported into it, or the frozen trunk's own; None: it starts at random.
    """
    if (run / IMPORTED).is_dir():
        return run / IMPORTED
    return Path(config.train.init_from or "") if config.train.freeze == "trunk" else None


def run_config(run: Path, *, trust_code: bool | Collection[str] = False) -> Config:
    """config.yaml of a run. Its data and first weights, which it names from where training started
    (run.dir is relative to that folder), are found from elsewhere too.
    """
    config = load_config(run / "config.yaml", trust_code=trust_code)
    runs = Path(config.run.dir)
    started = [*run.resolve().parents][: 1 + (1 if runs.is_absolute() else len(runs.parts))][-1]

    def found(path: Any) -> Any:
        if not isinstance(path, str) or _is_there(Path(path)) or not _is_there(started / path):
            return path
        return str(started / path)

    data, corpora = config.data, config.data.train
    if isinstance(corpora, tuple):
        corpora = tuple(c.model_copy(update={"path": found(c.path)}) for c in corpora)
    data = data.model_copy(update={"train": found(corpora), "val": found(data.val)})
    train = config.train.model_copy(update={"init_from": found(config.train.init_from)})
    return config.model_copy(update={"data": data, "train": train})


def _is_there(data: Path) -> bool:
    """A folder, or a Megatron pair."""
    return data.exists() or data.with_name(f"{data.name}.idx").exists()


def tokenizer_of(config: Config, run: Path) -> Path | None:
    """tokenizer.json of a run: the imported one, else that of its data. config: by `run_config`."""
    own = start_weights(config, run)
    places = [*([own] if own else []), *map(Path, config.data.paths)]
    files = (place / "tokenizer.json" for place in places)
    return next((file for file in files if file.is_file()), None)
