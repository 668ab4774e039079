"""The interval of a mean over slots against Student's, where both are the same."""

import numpy as np
import pytest

from dsv3_mtp.analysis.intervals import estimate
from dsv3_mtp.study.stats import t_interval


def test_with_as_many_slots_in_each_window_it_is_students_interval_of_the_window_means():
    values = np.random.default_rng(1).normal(size=(7, 5))
    found = estimate(values, np.ones((7, 5), bool))
    means = t_interval(values.mean(1).tolist())
    assert found is not None and found.half is not None and found.slots == 35
    assert found.mean == pytest.approx(means.mean)
    assert found.half == pytest.approx(means.high - means.mean)


def test_it_covers_the_truth_where_windows_differ_in_slots_and_slots_hang_together():
    """95 % of the time, give or take; an interval that took slots as independent covers half."""
    random, covered = np.random.default_rng(2), 0
    for _ in range(400):
        there = random.random((30, 12)) < random.random((30, 1))
        values = random.normal(size=(30, 1)) + 0.1 * random.normal(size=(30, 12))
        found = estimate(values, there)
        assert found is not None and found.half is not None
        covered += abs(found.mean) < found.half
    assert 0.90 < covered / 400 < 0.98


def test_no_slot_has_no_mean_and_one_window_no_interval():
    values, there = np.ones((3, 2)), np.zeros((3, 2), bool)
    assert estimate(values, there) is None
    there[1] = True
    assert estimate(values, there) == (1.0, None, 2)
