"""Means over slots with an interval over windows: slots of one window are not independent."""

import math
from typing import NamedTuple

import numpy as np
import scipy  # which loads scipy.stats, most of a second, at its first use

CONFIDENCE = 0.95


class Estimate(NamedTuple):
    """A mean, half of its 95 % interval (None: one window, or none that differs), its slots."""

    mean: float
    half: float | None
    slots: int


def estimate(values: np.ndarray, where: np.ndarray) -> Estimate | None:
    """Mean of `values` over the slots `where`, both (W, T); None: there is no such slot.

    A mean over slots is a ratio of two sums over windows, r = sum y_w / sum n_w. Its standard error
    is that of sum (y_w - r n_w) over the windows that have such slots (Cochran, Sampling
    Techniques, 6.3).
    """
    counts = where.sum(1)
    kept = counts > 0
    n, sums = counts[kept], np.where(where, values, 0.0).sum(1)[kept]
    if not kept.any():
        return None
    mean = float(sums.sum() / n.sum())
    windows = len(n)
    if windows < 2:
        return Estimate(mean, None, int(n.sum()))
    spread = float(((sums - mean * n) ** 2).sum() * windows / (windows - 1))
    quantile = float(scipy.stats.t.ppf(0.5 + CONFIDENCE / 2, windows - 1))
    return Estimate(mean, quantile * math.sqrt(spread) / float(n.sum()), int(n.sum()))
