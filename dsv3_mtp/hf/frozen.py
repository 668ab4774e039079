"""In what form a run keeps the trunk that it does not change (`train.freeze: trunk`)."""

from pathlib import Path

from dsv3_mtp.config import Config
from dsv3_mtp.files.fragments import Fragments
from dsv3_mtp.hf.load import open_checkpoint
from dsv3_mtp.precision.quantise import BLOCK
from dsv3_mtp.precision.stored import SCALE

HELD = "frozen trunk: held in FP8, as it is stored"


def stays_fp8(config: Config, checkpoint: Path | None = None) -> tuple[bool, list[str]]:
    """Whether the trunk stays in block-FP8, and what to tell the user: as `train.init_from` stores
    it, or the checkpoint that the run goes on with.

    Raises:
        ValueError: either is damaged.
    """
    if config.train.freeze != "trunk" or config.train.init_from is None:
        return False, []
    if checkpoint is not None:
        kept = any(name.endswith(SCALE) for name in Fragments(checkpoint).shapes)
        return kept, [HELD] if kept else []
    folder = Path(config.train.init_from)
    opened, settings, slots = open_checkpoint(folder)
    types = [
        opened.places[slot.name].dtype
        for slot in slots
        if slot.quantised and slot.key.startswith("model.")
    ]
    codes = types.count("F8_E4M3")
    if codes == 0:
        return False, []
    if codes < len(types):
        why = f"only {codes:,} of the {len(types):,} projections of {folder} are FP8"
    elif settings.block != BLOCK:
        why = f"the FP8 blocks of {folder} are {settings.block}, not {BLOCK}"
    else:
        return True, [HELD]
    return False, [f"frozen trunk: held in {config.train.dtype}, because {why}"]
