"""Shared experts where the answer is known: renumbered, independent, and half of them."""

import numpy as np
import pytest

from dsv3_mtp.analysis.routers import compare, one_hot, shared_experts
from dsv3_mtp.analysis.slots import Slots

E, K = 6, 2


def choices(windows: int, slots: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).random((windows, slots, E)).argsort(-1)[..., :K]


def test_experts_under_other_numbers_are_the_same_experts():
    ours = choices(8, 50, 1)
    renumbered = np.random.default_rng(2).permutation(E)[ours]
    found = compare(one_hot(ours, E), one_hot(renumbered, E), np.ones((8, 50), bool), K)
    assert found is not None and found[0].mean == 1.0
    assert found[1] == pytest.approx(K / E, abs=0.01)


def test_independent_choices_share_what_chance_gives_them():
    ours, theirs = one_hot(choices(40, 200, 3), E), one_hot(choices(40, 200, 4), E)
    found = compare(ours, theirs, np.ones((40, 200), bool), K)
    assert found is not None and found[0].half is not None
    assert abs(found[0].mean - found[1]) < 2 * found[0].half
    assert found[1] == pytest.approx(K / E, abs=0.01)


def test_only_slots_that_a_depth_has_are_counted():
    """The depth follows the layer on the slots that it has; the others hold -1."""
    trunk = choices(6, 30, 5)
    heads = trunk.copy()
    heads[:, :2] = -1
    taught = np.ones((6, 1, 30), bool)
    taught[:, :, :2] = False
    slots = Slots(
        trunk_experts=list(trunk[:, None]), head_experts=list(heads[:, None]), taught=list(taught)
    )
    (found,) = shared_experts(slots, [4], E)
    assert (found.depth, found.layer, found.share.mean) == (1, 4, 1.0)
    assert found.share.slots == 3 * 28  # every second window
    assert shared_experts(Slots(), [4], E) == []
