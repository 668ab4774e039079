"""What metrics.jsonl says of a step, beside its losses."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dsv3_mtp.config import Config
from dsv3_mtp.config.schedules import ScheduledStep
from dsv3_mtp.parallel.clip import clipped
from dsv3_mtp.parallel.launch import World
from dsv3_mtp.report.metrics import mfu


class NonFiniteError(RuntimeError):
    """A loss or gradient norm, of training or validation, is nan or infinite."""


def non_finite(record: Mapping[str, Any]) -> list[str]:
    """NAME = VALUE of every metric that is nan or infinite."""
    return [f"{name} = {value}" for name, value in record.items() if not math.isfinite(value)]


def norm_metrics(config: Config, norm: float, sides: Mapping[str, float]) -> dict[str, float]:
    """The gradient's norm, of the whole and of each side ("trunk", "mtp"), and whether
    `optim.grad_clip` was below it: of each side where the sides are clipped apart.
    """
    record = {"optim/grad_norm": norm}
    record |= {f"optim/grad_norm/{side}": value for side, value in sides.items()}
    bounded = sides if config.clips_apart else {"": norm}
    for side, value in bounded.items():
        key = f"optim/clipped/{side}" if side else "optim/clipped"
        record[key] = float(clipped(value, config.optim.grad_clip))
    return record


class Clipped:
    """In which share of the steps since the last line the gradient was clipped."""

    def __init__(self) -> None:
        self.counts: dict[str, tuple[int, int]] = {}  # of each key: steps that were, and all

    def add(self, record: Mapping[str, Any]) -> None:
        for key in (key for key in record if key.startswith("optim/clipped")):
            was, steps = self.counts.get(key, (0, 0))
            self.counts[key] = was + bool(record[key]), steps + 1

    def take(self) -> dict[str, float]:
        shares = {key: was / steps for key, (was, steps) in self.counts.items()}
        self.counts = {}
        return shares


def schedule_metrics(config: Config, step: ScheduledStep) -> dict[str, float]:
    """What the schedules gave to the step."""
    record: dict[str, float] = {}
    if config.mtp.depths:
        record["train/mtp_weight"] = step.loss_weight
        record |= {f"train/mtp_weight/{k}": w for k, w in enumerate(step.loss_weights, 1)}
    return record | {
        "optim/lr": step.lr,
        "moe/bias_update_speed": step.bias_speed,
        "train/batch_size": step.batch_size,
    }


def router_metrics(config: Config, load: Tensor, nodes: float) -> dict[str, float]:
    """MaxVio = (max load - mean) / mean (arXiv 2408.15664): mean over the trunk's routers, then
    each MTP router. And how many expert groups, which are nodes, a token is sent to: mean over all
    routers.

    load: (routers, E), nodes: sum over tokens and routers, both of the whole step.
    """
    if not len(load):
        return {}
    # of all routers together
    tokens = load.sum().item() / config.model.num_experts_per_tok
    violation = (load.amax(1) / load.mean(1) - 1).tolist()
    trunk = config.model.num_hidden_layers - config.model.first_k_dense_replace
    record = {"moe/max_violation": sum(violation[:trunk]) / trunk} if trunk else {}
    record |= {f"moe/mtp_max_violation/{k}": v for k, v in enumerate(violation[trunk:], start=1)}
    return record | {"moe/nodes_per_token": nodes / tokens}


def speed_metrics(tokens_per_s: float, flops_per_token: float, world: World) -> dict[str, float]:
    """Tokens per second over all ranks; MFU where the device's peak is known (report/metrics.py);
    on a GPU the peak of its memory.
    """
    on_gpu = world.device.type == "cuda"
    record = {"perf/tokens_per_s": tokens_per_s}
    device = torch.cuda.get_device_name() if on_gpu else "cpu"
    utilisation = mfu(tokens_per_s, flops_per_token, device, world.size)
    if utilisation is not None:
        record["perf/mfu"] = utilisation
    if on_gpu:
        record["perf/peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return record
