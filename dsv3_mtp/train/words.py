"""What a run says on the terminal beside its progress: how it starts, warns and ends."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dsv3_mtp.config import Config
from dsv3_mtp.data.ngrams import early_training
from dsv3_mtp.data.source import DataSource
from dsv3_mtp.model.size import ModelSize
from dsv3_mtp.parallel.launch import World
from dsv3_mtp.report.metrics import LEAK_RATIO
from dsv3_mtp.report.progress import floors_line, quantity
from dsv3_mtp.runs.loading import newest_checkpoint


def headline(
    config: Config, size: ModelSize, world: World, sources: Sequence[DataSource], val: DataSource
) -> str:
    """The run in one line. sources, val: its training and validation data."""
    heads = (
        config.mtp.mode if config.mtp.mode == "none" else f"{config.mtp.mode} D={config.mtp.depths}"
    )
    tokens = [source.tokens for source in sources if source.tokens is not None]
    data = quantity(sum(tokens)) if tokens else val.path
    experts = (
        f", EP {config.parallel.expert_parallel_size}"
        if config.parallel.expert_parallel_size > 1
        else ""
    )
    stages = f", {world.stages} pipeline stages" if world.stages > 1 else ""
    stages += f", rows over {world.slices} ranks" if world.slices > 1 else ""
    return (
        f"{config.run.name}: {quantity(size.total)} parameters "
        f"({quantity(size.active)} active) + MTP {heads} "
        f"({quantity(size.mtp_total)}), "
        f"{quantity(config.train.total_tokens)} tokens of {data}, "
        f"{world.size} x {world.device.type}{stages}, "
        f"ZeRO-{config.parallel.zero_stage}{experts}, "
        f"{config.train.dtype}"
    )


def leak(step: int, record: Mapping[str, Any], val: DataSource) -> str | None:
    """A warning where the loss of a depth lies far below the main loss, as that of a leaked target
    would. On a task a head may well solve what the main head has not solved yet.
    """
    if val.task is not None:
        return None
    main = record["train/main_loss"]
    low = {
        k: v for k, v in record.items() if k.startswith("train/mtp_loss/") and v < LEAK_RATIO * main
    }
    if not low:
        return None
    return (
        f"WARNING step {step}: {low} below {LEAK_RATIO} "
        f"x main loss {main:.3f}: is a target leaking?"
    )


def non_finite(where: str, bad: Sequence[str], folder: Path) -> str:
    """What stopped the run in `folder`: metrics that are nan or infinite."""
    last = newest_checkpoint(folder / "checkpoints")
    remedy = f"the last checkpoint is {last}" if last else "there is no checkpoint yet"
    return (
        f"{where}: {', '.join(bad)}; {remedy}. "
        "Lower optim.lr or optim.grad_clip, or look at the data of this step."
    )


def ending(step: int, tokens: int, seconds: float, stopped_by: str | None) -> str:
    """How the run ended. stopped_by: None where it is finished."""
    if stopped_by is not None:
        return f"stopped at step {step} by {stopped_by}; the same command continues"
    return f"finished: {step} steps, {tokens:,} tokens, {seconds:.0f} s of training"


def floors(record: Mapping[str, Any], why: str | None) -> list[str]:
    """The n-gram floors beside the main loss. why: there are none; None: there was nothing to
    count.
    """
    has = any(name.startswith("val/floor/") for name in record)
    lines = [floors_line(record) if has else why, early_training(record)]
    return [line for line in lines if line is not None]
