"""What changes during a run, as pure functions of progress: the fraction of train.total_tokens
consumed.

Nothing here has state, so a resumed run needs only its token count. "V3" is arXiv 2412.19437. A
threshold belongs to what follows it: at exactly 10T of 14.8T tokens the MTP weight is already 0.1.
A progress outside [0, 1] is a ValueError in every function.
"""

from itertools import pairwise
from math import ceil, cos, floor, pi
from typing import Literal, NamedTuple

from dsv3_mtp.config import (
    Config,
    ConstantWeight,
    LossWeight,
    MTPConfig,
    OptimConfig,
    RampWeight,
    StepWeight,
    TrainConfig,
    WarmupWeight,
)

_ROUNDING = 1e-9  # progress is a rounded quotient: 2/3 of the run times 3 must count as 2


def learning_rate(optim: OptimConfig, progress: float) -> float:
    """V3 4.2: linear warm-up from 0 to lr, constant, cosine to decay_ratio * lr, constant,
    final_ratio * lr.

    At progress 0 with a warm-up the rate is 0: pass the progress that the coming step will reach.
    """
    progress, schedule = _checked(progress), optim.schedule
    if progress >= schedule.final_start:
        return optim.lr * schedule.final_ratio
    if progress >= schedule.decay_start:
        x = _position(progress, schedule.decay_start, schedule.decay_end)
        return optim.lr * _cosine(1.0, schedule.decay_ratio, x)
    return optim.lr * _position(progress, 0.0, schedule.warmup)


def mtp_loss_weight(loss_weight: LossWeight, progress: float) -> float:
    """lambda of V3 eq. 25. V3 4.2: 0.3 for the first 10T of 14.8T tokens, then 0.1."""
    progress = _checked(progress)
    match loss_weight:
        case ConstantWeight():
            return loss_weight.value
        case StepWeight():
            return loss_weight.values[sum(progress >= at for at in loss_weight.at)]
        case RampWeight():
            x = _position(progress, loss_weight.begin, loss_weight.until)
            between = _cosine if loss_weight.type == "cosine" else _line
            return between(loss_weight.start, loss_weight.end, x)
        case WarmupWeight():
            return _line(0.0, loss_weight.value, _position(progress, 0.0, loss_weight.until))
        case _:
            return _piecewise(loss_weight.points, progress)


def active_depths(
    curriculum: Literal["none", "forward", "reverse"], depths: int, progress: float
) -> int:
    """How many of the D depths are trained now: D equal stages, growing or shrinking (arXiv
    2505.22757).
    """
    stage = floor(_checked(progress) * depths + _ROUNDING)
    if curriculum == "forward":
        return min(depths, stage + 1)
    if curriculum == "reverse":
        return max(min(depths, 1), depths - stage)
    return depths


def depth_loss_weights(mtp: MTPConfig, progress: float) -> tuple[float, ...]:
    """The factor of each L_k in the total loss: lambda / D * w_k (V3 eq. 25), 0 for inactive
    depths.

    D is the number of depths of the model, active or not. Length D; () for mode none.
    """
    active = active_depths(mtp.curriculum, mtp.depths, progress)
    weight = mtp_loss_weight(mtp.loss_weight, progress)
    shares = mtp.depth_weights or (1.0,) * mtp.depths
    return tuple(weight * shares[k] / mtp.depths if k < active else 0.0 for k in range(mtp.depths))


def bias_update_speed(train: TrainConfig, progress: float) -> float:
    """gamma of the router bias (V3 2.1.2). V3 4.2: 0.001 for the first 14.3T of 14.8T tokens, then
    0.
    """
    return train.bias_update_speed if _checked(progress) < train.bias_update_until else 0.0


def batch_size(train: TrainConfig, progress: float, multiple: int = 1) -> int:
    """Sequences in the coming step, over all ranks: train.batch_size, or the ramp towards it (V3
    4.2).

    multiple: micro_batch_size * ranks; the result is rounded down to a multiple of it, and is at
        least that.
    """
    size, progress, ramp = float(train.batch_size), _checked(progress), train.batch_size_ramp
    if ramp is not None:
        size = _line(ramp.start, train.batch_size, _position(progress, 0.0, ramp.until))
    return max(1, floor(size / multiple + _ROUNDING)) * multiple


class Step(NamedTuple):
    """All that one optimizer step takes from the schedules."""

    batch_size: int  # sequences over all ranks
    tokens: int  # consumed once it is done
    lr: float
    loss_weights: tuple[float, ...]  # (D,) factor of each L_k
    bias_speed: float


def coming_step(config: Config, tokens: int, multiple: int) -> Step:
    """The step after `tokens` tokens. multiple: as for `batch_size`."""
    total = config.train.total_tokens
    progress = min(tokens / total, 1.0)
    size = batch_size(config.train, progress, multiple)
    after = tokens + size * config.data.seq_len
    # A step has the learning rate of the progress it reaches, or the first one would not move.
    lr = learning_rate(config.optim, min(after / total, 1.0))
    speed = bias_update_speed(config.train, progress)
    return Step(size, after, lr, depth_loss_weights(config.mtp, progress), speed)


def total_steps(train: TrainConfig, seq_len: int, multiple: int = 1) -> int:
    """Optimizer steps until train.total_tokens are consumed, with `batch_size` sequences in
    each.
    """
    steps = tokens = 0
    ramp_end = (
        0.0 if train.batch_size_ramp is None else train.batch_size_ramp.until * train.total_tokens
    )
    while tokens < min(ramp_end, train.total_tokens):
        tokens += batch_size(train, tokens / train.total_tokens, multiple) * seq_len
        steps += 1
    left = max(train.total_tokens - tokens, 0)
    return steps + ceil(left / (batch_size(train, 1.0, multiple) * seq_len))


def _checked(progress: float) -> float:
    if not -_ROUNDING <= progress <= 1 + _ROUNDING:  # also false for nan
        raise ValueError(
            "progress must be within [0, 1], tokens consumed "
            f"over train.total_tokens (got {progress})"
        )
    return min(max(progress, 0.0), 1.0)


def _position(progress: float, begin: float, end: float) -> float:
    """Where progress stands between two fractions, in [0, 1]; 1 from `end` on."""
    if progress >= end:
        return 1.0
    return max(0.0, (progress - begin) / (end - begin))


def _line(start: float, end: float, x: float) -> float:
    return start * (1 - x) + end * x


def _cosine(start: float, end: float, x: float) -> float:
    return _line(start, end, (1 - cos(pi * x)) / 2)


def _piecewise(points: tuple[tuple[float, float], ...], progress: float) -> float:
    if progress <= points[0][0]:
        return points[0][1]
    for (begin, start), (end, value) in pairwise(points):
        if progress < end:
            return _line(start, value, _position(progress, begin, end))
    return points[-1][1]
