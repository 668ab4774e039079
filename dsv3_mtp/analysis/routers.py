"""Do the router of an MTP module and those of the trunk send the same tokens to the same experts?

The numbers of experts mean nothing across layers: expert 3 of one is no relative of expert 3 of
another. So the experts of the module are first matched one to one with those of a trunk layer, by
how often both are chosen for the same token (assignment problem, on every second window); the share
of common experts is then counted on the other windows. Its floor is what two routers have that
choose as often as these, but independently.
"""

from typing import Any, NamedTuple

import numpy as np
import scipy

from dsv3_mtp.analysis.intervals import Estimate, estimate
from dsv3_mtp.analysis.slots import Slots


class Shared(NamedTuple):
    """How much of a depth's choice a trunk layer shares."""

    depth: int
    layer: int  # number of the trunk layer, 0-based
    share: Estimate  # of the K experts, after matching
    independent: float  # the same of independent choices with the same loads


def one_hot(chosen: np.ndarray, experts: int) -> np.ndarray:
    """(W, T, K) expert numbers, -1: none -> (W, T, E) float64."""
    hits = np.zeros((*chosen.shape[:2], experts + 1))
    np.put_along_axis(hits, chosen, 1.0, axis=2)  # -1 is the last column
    return hits[..., :experts]


def shared_experts(slots: Slots, layers: list[int], experts: int) -> list[Shared]:
    """layers: numbers of the trunk layers with routers; experts: of each router."""
    if not slots.head_experts or len(slots.head_experts) < 2:
        return []
    trunk, heads = slots.array("trunk_experts"), slots.array("head_experts")
    taught, found = slots.array("taught"), []
    for depth in range(heads.shape[1]):
        there = taught[:, depth] & (heads[:, depth, :, 0] >= 0)
        theirs = one_hot(heads[:, depth], experts)
        for number, layer in enumerate(layers):
            ours = one_hot(trunk[:, number], experts)
            if (one := compare(ours, theirs, there, heads.shape[-1])) is not None:
                found.append(Shared(depth + 1, layer, *one))
    return found


def compare(
    ours: np.ndarray, theirs: np.ndarray, there: np.ndarray, chosen: int
) -> tuple[Estimate, float] | None:
    """ours, theirs: (W, T, E) one-hot choices; there: (W, T) bool; chosen: K."""
    fit, test = there[::2], there[1::2]
    if not fit.any() or not test.any():
        return None
    together = ours[::2][fit].T @ theirs[::2][fit]  # (E, E)
    own, other = scipy.optimize.linear_sum_assignment(together, maximize=True)
    a, b = ours[1::2][..., own], theirs[1::2][..., other]
    both: Any = (a * b).sum(-1) / chosen
    share = estimate(both, test)
    assert share is not None
    independent = float((a[test].mean(0) * b[test].mean(0)).sum() / chosen)
    return share, independent
