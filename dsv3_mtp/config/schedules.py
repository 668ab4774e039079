"""What changes during a run, as pure functions of progress: the fraction of train.total_tokens
consumed.

Nothing here has state, so a resumed run needs only its token count, and the state of lambda's
schedule where that has one. The schedules of lambda themselves are in loss_weights/. "V3" is arXiv
2412.19437. A threshold belongs to what follows it: at exactly 10T of 14.8T tokens the MTP weight is
already 0.1. A progress outside [0, 1] is a ValueError in every function.
"""

import json
from math import ceil, floor, inf
from numbers import Real
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from dsv3_mtp.config.curves import cosine, line, position
from dsv3_mtp.config.depth_weights import DepthRule
from dsv3_mtp.config.loss_weights import AdaptiveSchedule, LambdaSchedule, State
from dsv3_mtp.config.mtp import MTPConfig
from dsv3_mtp.config.reader import show
from dsv3_mtp.config.training import OptimConfig, TrainConfig

if TYPE_CHECKING:  # run.py asks depth_loss_weights for one of its rules
    from dsv3_mtp.config.run import Config

_ROUNDING = 1e-9  # progress is a rounded quotient: 2/3 of the run times 3 must count as 2


def learning_rate(optim: OptimConfig, progress: float) -> float:
    """V3 4.2: warm-up to lr, constant, cosine to decay_ratio * lr, constant, final_ratio * lr.

    At progress 0 with a warm-up the rate is 0: pass the progress that the coming step will reach.
    """
    progress, schedule = _checked(progress), optim.schedule
    if progress >= schedule.final_start:
        return optim.lr * schedule.final_ratio
    if progress >= schedule.decay_start:
        x = position(progress, schedule.decay_start, schedule.decay_end)
        return optim.lr * cosine(1.0, schedule.decay_ratio, x)
    return optim.lr * position(progress, 0.0, schedule.warmup)


def mtp_loss_weight(
    loss_weight: LambdaSchedule, progress: float, state: State | None = None
) -> float:
    """lambda of V3 eq. 25. V3 4.2: 0.3 for the first 10T of 14.8T tokens, then 0.1.

    state: of a schedule that has one; None: that before the first step.

    Raises:
        ValueError: the schedule gives no number >= 0.
    """
    progress = _checked(progress)
    if isinstance(loss_weight, AdaptiveSchedule) and state is not None:
        weight = loss_weight.weight_in(state, progress)
    else:
        weight = loss_weight.weight(progress)
    if not isinstance(weight, Real) or not 0 <= weight < inf:  # also false for nan
        text = f"{loss_weight.type} must give a number >= 0"
        raise ValueError(f"mtp.loss_weight: {text} (got {show(weight)} at progress {progress})")
    return weight


def first_state(mtp: MTPConfig) -> State | None:
    """The state of lambda's schedule before the first step; None: it has none."""
    schedule = mtp.loss_weight
    if not isinstance(schedule, AdaptiveSchedule):
        return None
    return _saved(schedule, schedule.first_state())


def next_state(mtp: MTPConfig, state: State | None, metrics: dict[str, float]) -> State | None:
    """The state after a step with these metrics, as JSON gives it back. Raises ValueError: JSON
    cannot hold the state, so that no checkpoint could.
    """
    schedule = mtp.loss_weight
    if state is None or not isinstance(schedule, AdaptiveSchedule):
        return None
    return _saved(schedule, schedule.next_state(state, metrics))


def _saved(schedule: AdaptiveSchedule, state: Any) -> State:
    """As JSON gives it back."""
    where = f"mtp.loss_weight: the state of {schedule.type}"
    if not isinstance(state, dict):
        raise ValueError(f"{where} must be a mapping (got {show(state)})")
    try:
        return json.loads(json.dumps(state, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where} cannot be saved: {error}") from None


def active_depths(
    curriculum: Literal["none", "forward", "reverse"], depths: int, progress: float
) -> int:
    """How many of the D depths are trained now, by D equal stages (arXiv 2505.22757)."""
    stage = floor(_checked(progress) * depths + _ROUNDING)
    if curriculum == "forward":
        return min(depths, stage + 1)
    if curriculum == "reverse":
        return max(min(depths, 1), depths - stage)
    return depths


def depth_shares(mtp: MTPConfig, progress: float) -> tuple[float, ...]:
    """(D,) w_k of V3 eq. 25, 0 for depths that the curriculum has switched off."""
    rule, depths = mtp.depth_weights, mtp.depths
    shares = rule.weights(depths, _checked(progress)) if isinstance(rule, DepthRule) else rule
    shares = (1.0,) * depths if shares is None or not depths else shares
    if len(shares) != depths or not all(0 <= share < inf for share in shares):
        raise ValueError(f"mtp.depth_weights: must be {depths} numbers >= 0 (got {shares})")
    active = active_depths(mtp.curriculum, depths, progress)
    return tuple(share if k < active else 0.0 for k, share in enumerate(shares))


def depth_loss_weights(
    mtp: MTPConfig, progress: float, state: State | None = None
) -> tuple[float, ...]:
    """(D,) factor of each L_k in the loss: lambda / D * w_k (V3 eq. 25), 0 for inactive depths.

    D counts active depths and others; () for mode none. state: as for mtp_loss_weight.
    """
    weight = mtp_loss_weight(mtp.loss_weight, progress, state)
    return tuple(weight * share / mtp.depths for share in depth_shares(mtp, progress))


def bias_update_speed(train: TrainConfig, progress: float) -> float:
    """gamma of the router bias (V3 2.1.2; 4.2: 0.001, for the last 0.5T of 14.8T tokens 0)."""
    return train.bias_update_speed if _checked(progress) < train.bias_update_until else 0.0


def batch_size(train: TrainConfig, progress: float, multiple: int = 1) -> int:
    """Sequences in the coming step over all ranks: train.batch_size, or the ramp to it (V3 4.2).

    multiple: micro_batch_size * ranks; the result is rounded down to a multiple, at least one.
    """
    size, progress, ramp = float(train.batch_size), _checked(progress), train.batch_size_ramp
    if ramp is not None:
        size = line(ramp.start, train.batch_size, position(progress, 0.0, ramp.until))
    return max(1, floor(size / multiple + _ROUNDING)) * multiple


class ScheduledStep(NamedTuple):
    """All that one optimizer step takes from the schedules."""

    batch_size: int  # sequences over all ranks
    tokens: int  # consumed once it is done
    lr: float
    loss_weight: float  # lambda
    loss_weights: tuple[float, ...]  # (D,) factor of each L_k
    bias_speed: float


def coming_step(
    config: "Config", tokens: int, multiple: int, state: State | None = None
) -> ScheduledStep:
    """The step after `tokens` tokens. multiple: see `batch_size`; state: of lambda's schedule."""
    total = config.train.total_tokens
    progress = min(tokens / total, 1.0)
    size = batch_size(config.train, progress, multiple)
    after = tokens + size * config.data.seq_len
    # A step has the learning rate of the progress it reaches, or the first one would not move.
    lr = learning_rate(config.optim, min(after / total, 1.0))
    speed = bias_update_speed(config.train, progress)
    weight = mtp_loss_weight(config.mtp.loss_weight, progress, state)
    weights = depth_loss_weights(config.mtp, progress, state)
    return ScheduledStep(size, after, lr, weight, weights, speed)


def total_steps(train: TrainConfig, seq_len: int, multiple: int = 1) -> int:
    """Optimizer steps until train.total_tokens are consumed. multiple: see `batch_size`."""
    steps = tokens = 0
    ramp = train.batch_size_ramp
    ramp_end = 0.0 if ramp is None else ramp.until * train.total_tokens
    while tokens < min(ramp_end, train.total_tokens):
        tokens += batch_size(train, tokens / train.total_tokens, multiple) * seq_len
        steps += 1
    left = max(train.total_tokens - tokens, 0)
    return steps + ceil(left / (batch_size(train, 1.0, multiple) * seq_len))


def _checked(progress: float) -> float:
    if not -_ROUNDING <= progress <= 1 + _ROUNDING:  # also false for nan
        text = "must be within [0, 1], tokens consumed over train.total_tokens"
        raise ValueError(f"progress {text} (got {progress})")
    return min(max(progress, 0.0), 1.0)
