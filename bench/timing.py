"""The one timer of all benchmarks, and ratios from turns that interleave.

On one thread of a CPU times are CPU seconds of the process, so that other work on the machine
touches them little. They are wall seconds of several threads, whose CPU seconds would add up,
waiting included, and on a GPU, where a time begins and ends with an idle device.
"""

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch


def clock(device: torch.device) -> str:
    """ "CPU" or "wall": what `now` counts."""
    return "CPU" if device.type == "cpu" and torch.get_num_threads() == 1 else "wall"


def now(device: torch.device) -> float:
    """Seconds, once the device has finished all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.process_time() if clock(device) == "CPU" else time.perf_counter()


def timed(function: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one call."""
    start = now(device)
    function()
    return now(device) - start


def interleave(
    variants: Mapping[str, Callable[[], Any]],
    rounds: int,
    device: torch.device,
    *,
    warm: int = 1,
    timer: Callable[[Callable[[], Any], torch.device], float] = timed,
) -> dict[str, list[float]]:
    """Seconds of each variant in each round. Each round runs all of them once, in random order,
    after `warm` rounds that do not count. timer: what a run of one took, where that is not all of
    it.
    """
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(warm + rounds):
        for name in random.sample(list(variants), len(variants)):
            elapsed = timer(variants[name], device)
            if number >= warm:
                seconds[name].append(elapsed)
    return seconds


def quartiles(values: Sequence[float]) -> list[float]:
    """Lower quartile, median, upper quartile."""
    values = list(values)
    return statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3


def ratios(base: Sequence[float], own: Sequence[float]) -> list[float]:
    """Quartiles of base over own, round by round: above 1 where own is the faster one."""
    return quartiles([b / s for b, s in zip(base, own, strict=True)])
