"""What a run says on the terminal beside its progress: how it starts, warns and ends."""

import os
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dsv3_mtp.config import Config, schedules
from dsv3_mtp.config.reader import show
from dsv3_mtp.data.ngrams import early_training
from dsv3_mtp.data.sampler import Sampler
from dsv3_mtp.data.source import DataSource
from dsv3_mtp.files.run_folder import newest_checkpoint
from dsv3_mtp.model.size import ModelSize
from dsv3_mtp.parallel.launch import World
from dsv3_mtp.report.metrics import LEAK_RATIO
from dsv3_mtp.report.progress import WIDTH, floors_line, quantity

TIMES = {"at", "begin", "until", "points"}  # keys of a schedule that are fractions of the run


def header(config: Config, size: ModelSize, world: World, sampler: Sampler) -> list[str]:
    """One line each on the model, the data and lambda; none is wider than a terminal."""
    lines = [model_pieces(config, size, world), data_pieces(config, world, sampler)]
    lines += [lambda_pieces(config)] if config.mtp.depths else []
    return [textwrap.fill(", ".join(line), WIDTH, subsequent_indent="    ") for line in lines]


def weightless(config: Config, size: ModelSize) -> list[str]:
    """A note where the heads end the run without a weight: no gradient holds them against AdamW's
    decay (docs/schedules.md).
    """
    mtp, decay = config.mtp, config.optim.weight_decay
    adaptive = schedules.first_state(mtp) is not None
    if not (size.mtp_total and decay) or mtp.term_names or adaptive:
        return []
    weighs = [any(schedules.depth_loss_weights(mtp, n / 100)) for n in range(100)]
    idle = weighs[::-1].index(True) if any(weighs) else 100
    if idle < 5:
        return []
    text = f"the heads' weight is 0 in the last {idle} % of the run, where optim.weight_decay goes"
    return [f"note: {text} on: they will draft ever worse (docs/schedules.md)"]


def busy(world: World) -> list[str]:
    """Threads of one operation wait for the last: a core that is shared with another program can
    make a step ten times as long (docs/log.md).
    """
    load, cores = os.getloadavg()[0], len(os.sched_getaffinity(0))
    if world.device.type != "cpu" or torch.get_num_threads() == 1 or load < cores:
        return []
    text = f"this machine is busy (load {load:.1f} on {cores} cores)"
    return [f"note: {text}; train.threads: 1 may be much faster"]


def model_pieces(config: Config, size: ModelSize, world: World) -> list[str]:
    mtp, parallel = config.mtp, config.parallel
    model = f"{config.run.name}: {quantity(size.total)} parameters ({quantity(size.active)} active)"
    heads = f"{mtp.mode} D={mtp.depths} ({quantity(size.mtp_total)})" if mtp.depths else "none"
    pieces = [f"{model} + MTP {heads}", f"{world.size} x {world.device.type}"]
    pieces += [f"{world.stages} pipeline stages"] * (world.stages > 1)
    pieces += [f"rows over {world.slices} ranks"] * (world.slices > 1)
    pieces += [f"ZeRO-{parallel.zero_stage}"]
    pieces += [f"EP {parallel.expert_parallel_size}"] * (parallel.expert_parallel_size > 1)
    return [*pieces, config.train.dtype]


def data_pieces(config: Config, world: World, sampler: Sampler) -> list[str]:
    """Steps, tokens, and how often the run reads each of its sources."""
    train, length = config.train, config.data.seq_len
    steps = schedules.total_steps(train, length, train.micro_batch_size * world.data_size)
    size = f"{'up to ' * (train.batch_size_ramp is not None)}{train.batch_size * length:,} tokens"
    pieces = [f"data: {steps:,} steps of {size}", f"{quantity(train.total_tokens)} in all"]
    for source, weight in zip(sampler.sources, sampler.weights, strict=True):
        share = train.total_tokens * weight
        if source.tokens is None:
            pieces.append(f"newly generated examples of {source.path}")
            continue
        piece = f"{share / source.tokens:.2g} epochs of {source.path} ({quantity(source.tokens)})"
        known = source.vocab_size
        if known is not None and known < config.model.vocab_size:
            piece += f" with {known:,} of the model's {config.model.vocab_size:,} token ids"
        pieces.append(piece)
    return pieces


def lambda_pieces(config: Config) -> list[str]:
    """The schedule of lambda by its keys, and what else decides on the weights of the depths."""
    mtp = config.mtp
    keys: dict[str, Any] = mtp.loss_weight.model_dump(mode="json")
    first = f"lambda: {keys.pop('type')}"
    pieces = [f"{key} {_short(value)}" for key, value in keys.items() if value is not None]
    if TIMES & keys.keys():
        pieces.append("in fractions of the run")
    first += f" ({', '.join(pieces)})" if pieces else ""
    more: dict[str, Any] = {"curriculum": mtp.curriculum, "detach": mtp.detach}
    more["objective"] = dict(mtp.objective)
    if mtp.depth_weights is not None:
        more["depth weights"] = mtp.model_dump(mode="json")["depth_weights"]
    usual = {"objective": {"ce": 1.0}, "detach": "none", "curriculum": "none"}
    said = [f"{key} {_short(value)}" for key, value in more.items() if value != usual.get(key)]
    return [first, *said]


def _short(value: Any) -> str:
    """A setting as in YAML, its numbers to three digits."""
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_short(item)}" for key, item in value.items()) + "}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "[" + ", ".join(map(_short, value)) + "]"
    return value if isinstance(value, str) else show(value)


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


def non_finite(where: str, bad: Sequence[str], folder: Path, own: Sequence[str] = ()) -> str:
    """What stopped the run in `folder`: metrics that are nan or infinite. own: code outside the
    package that the run computes with.
    """
    last = newest_checkpoint(folder / "checkpoints")
    remedy = f"the last checkpoint is {last}" if last else "there is no checkpoint yet"
    return (
        f"{where}: {', '.join(bad)}; {remedy}. "
        f"Lower optim.lr or optim.grad_clip, or look at {' and '.join([*own, ''])}"
        "the data of this step."
    )


def ending(step: int, tokens: int, seconds: float, stopped_by: str | None) -> str:
    """How the run ended. stopped_by: None where it is finished."""
    if stopped_by is not None:
        return f"stopped at step {step} by {stopped_by}; the same command continues"
    return f"finished: {step} steps, {tokens:,} tokens, {seconds:.0f} s of training"


def floors(record: Mapping[str, Any], why: str | None) -> list[str]:
    """The n-gram floors beside the main loss. why: there are none; None: nothing to count."""
    has = any(name.startswith("val/floor/") for name in record)
    lines = [floors_line(record) if has else why, early_training(record)]
    return [line for line in lines if line is not None]
