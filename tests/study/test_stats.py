"""The statistics against closed forms, tables and scipy's own routes, and their coverage by
simulation.
"""

import itertools
import math

import numpy as np
import pytest
from scipy import stats as reference

from dsv3_mtp.study.stats import (
    equivalence,
    exact_rate,
    holm,
    logrank,
    mcnemar,
    solve_curve,
    speed_up,
    t_interval,
)


def test_paired_interval_is_students():
    a, b = np.array([3.1, 2.9, 3.3, 3.0, 3.2]), np.array([3.0, 2.7, 3.4, 2.9, 3.0])
    found, expected = t_interval(a - b), reference.ttest_rel(a, b)
    assert found.p == pytest.approx(expected.pvalue)
    low, high = expected.confidence_interval(0.95)
    assert (found.low, found.high) == (pytest.approx(low), pytest.approx(high))
    assert (found.mean, found.n) == (pytest.approx(0.1), 5)


def test_interval_of_three_values_uses_the_tables_4_303():
    found = t_interval([1.0, 2.0, 3.0])
    assert (found.high - found.mean) * math.sqrt(3) == pytest.approx(4.3027, abs=1e-4)


@pytest.mark.parametrize("n", [3, 5])
def test_intervals_of_few_seeds_cover_95_percent(n):
    draws = np.random.default_rng(0).normal(1.0, 2.0, size=(2000, n))
    covered = np.mean([i.low <= 1.0 <= i.high for i in map(t_interval, draws)])
    assert covered == pytest.approx(0.95, abs=3 * math.sqrt(0.95 * 0.05 / 2000))


def test_one_seed_has_no_interval_and_no_seed_is_an_error():
    found = t_interval([0.3])
    assert found.covers_zero and found.high == math.inf and found.p == 1.0
    with pytest.raises(ValueError, match="finite"):
        t_interval([])
    with pytest.raises(ValueError, match="finite"):
        t_interval([1.0, math.nan])


def test_runs_that_are_the_same_have_a_difference_of_exactly_zero():
    assert (t_interval([0.0, 0.0]).p, t_interval([0.0, 0.0]).covers_zero) == (1.0, True)
    assert (t_interval([0.1, 0.1]).p, t_interval([0.1, 0.1]).covers_zero) == (0.0, False)


def test_holm_of_a_worked_example():
    # p ranked .01 .02 .03 .04: times 4, 3, 2, 1, and never below the one before
    adjusted = holm({"d": 0.04, "a": 0.01, "c": 0.03, "b": 0.02})
    assert adjusted == pytest.approx({"a": 0.04, "b": 0.06, "c": 0.06, "d": 0.06})
    assert list(adjusted) == ["d", "a", "c", "b"]
    assert holm({"a": 0.9, "b": 0.8}) == {"a": 1.0, "b": 1.0}


def test_holm_keeps_the_rate_of_false_claims_in_a_family():
    draws = np.random.default_rng(1).uniform(size=(2000, 6))
    wrong = np.mean([min(holm(dict(enumerate(row))).values()) < 0.05 for row in draws])  # type: ignore[arg-type]
    assert wrong <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 2000)


def test_equivalence_is_two_one_sided_t_tests():
    x = [0.01, -0.02, 0.03, 0.0, 0.01]
    for margin in (0.02, 0.05):
        above = reference.ttest_1samp(x, -margin, alternative="greater").pvalue
        below = reference.ttest_1samp(x, margin, alternative="less").pvalue
        assert equivalence(x, margin) == pytest.approx(max(above, below))
    assert equivalence([0.0], 1.0) == 1.0
    assert equivalence([0.0, 0.0], 0.1) == 0.0 and equivalence([0.2, 0.2], 0.1) == 1.0


def test_exact_interval_is_clopper_and_pearsons():
    assert exact_rate(0, 5) == (0.0, pytest.approx(1 - 0.025 ** (1 / 5)))
    assert exact_rate(5, 5) == (pytest.approx(0.025 ** (1 / 5)), 1.0)
    low, high = exact_rate(3, 10)
    assert (low, high) == (
        pytest.approx(reference.beta.ppf(0.025, 3, 8)),
        pytest.approx(reference.beta.ppf(0.975, 4, 7)),
    )


def test_mcnemars_exact_p_counts_the_pairs_that_differ():
    """Published: 6 pairs against 16 give p = 0.0525 (two-sided binomial); ties say nothing."""
    pairs = [(1.0, 0.0)] * 6 + [(0.0, 1.0)] * 16 + [(1.0, 1.0)] * 50 + [(0.0, 0.0)] * 9
    expected = 2 * sum(math.comb(22, k) for k in range(7)) / 2**22
    assert mcnemar(pairs) == pytest.approx(expected) == pytest.approx(0.0525, abs=1e-4)
    assert mcnemar([(1.0, 0.0)] * 6) == pytest.approx(2 / 64)
    assert mcnemar([(1.0, 1.0)] * 5) == 1.0


def stratified_logrank(pairs):
    """Chi-square of the log-rank test, stratum by stratum, event time by event time."""
    excess = variance = 0.0
    for pair in pairs:
        for at in sorted({time for time, event in pair if event}):
            risk = [time >= at for time, _ in pair]
            events = [event and time == at for time, event in pair]
            n, d = sum(risk), sum(events)
            excess += events[0] - d * risk[0] / n
            if n > 1:
                variance += d * (risk[0] / n) * (risk[1] / n) * (n - d) / (n - 1)
    return excess**2 / variance if variance else 0.0


# Remission in weeks of 21 pairs of leukaemia patients, (placebo, 6-MP), False: censored: Freireich
# et al. (1963)
PLACEBO = [1, 22, 3, 12, 8, 17, 2, 11, 8, 12, 2, 5, 4, 15, 8, 23, 5, 11, 4, 1, 8]
DRUG = [10, 7, -32, 23, 22, 6, 16, -34, -32, -25, -11, -20, -19, 6, -17, -35, 6, 13, -9, -6, -10]


def test_the_log_rank_test_of_pairs_is_the_stratified_one_of_published_data():
    """Klein and Moeschberger, section 7.5: 18 pairs prefer the drug, 3 the placebo, Z = 3.27."""
    pairs = [((t, True), (abs(u), u > 0)) for t, u in zip(PLACEBO, DRUG, strict=True)]
    wins, losses, p = logrank(pairs)
    assert (wins, losses) == (18, 3)
    assert stratified_logrank(pairs) == pytest.approx((wins - losses) ** 2 / (wins + losses))
    assert math.sqrt(stratified_logrank(pairs)) == pytest.approx(3.27, abs=0.005)
    assert p == pytest.approx(2 * sum(math.comb(21, k) for k in range(4)) / 2**21)


def test_the_log_rank_test_of_random_pairs_is_the_stratified_one():
    rng = np.random.default_rng(0)
    for _ in range(50):
        times, events = rng.integers(1, 6, size=(12, 2)), rng.random((12, 2)) < 0.7
        pairs = [
            tuple((float(t), bool(e)) for t, e in zip(*row, strict=True))
            for row in zip(times, events, strict=True)
        ]
        wins, losses, _ = logrank(pairs)
        expected = (wins - losses) ** 2 / (wins + losses) if wins + losses else 0.0
        assert stratified_logrank(pairs) == pytest.approx(expected)


def test_the_p_of_a_log_rank_test_is_that_of_all_swaps_within_pairs():
    pairs = [((1.0, True), (3.0, True)), ((2.0, True), (5.0, False)), ((4.0, True), (2.0, True))]
    pairs += [((1.0, True), (2.0, True)), ((3.0, True), (9.0, False)), ((3.0, True), (3.0, True))]
    wins, losses, p = logrank(pairs)
    sizes = []
    for swaps in itertools.product([False, True], repeat=len(pairs)):
        swapped = [pair[::-1] if swap else pair for pair, swap in zip(pairs, swaps, strict=True)]
        a, b, _ = logrank(swapped)
        sizes.append(abs(a - b))
    assert p == pytest.approx(np.mean(np.array(sizes) >= abs(wins - losses)))


def test_tokens_to_equal_loss_of_power_laws_are_exact():
    """loss = a - b log tokens: half the tokens everywhere is a factor of two at every end."""
    tokens = [100.0 * 2**n for n in range(6)]
    theirs = [(t, 5 - 0.3 * math.log(t)) for t in tokens]
    ours = [(t, 5 - 0.3 * math.log(2 * t)) for t in tokens]
    assert speed_up(ours, theirs) == pytest.approx(2.0)
    assert speed_up(theirs, ours) == pytest.approx(0.5)
    assert speed_up(ours, ours) == 1.0
    low = [(t, loss - 9) for t, loss in ours]
    assert speed_up(low, theirs) is None and speed_up(theirs, low) is None
    frozen = [(t, 3.0) for t in tokens]  # a trunk that does not learn is not faster than another
    assert speed_up(frozen[:2], frozen) is None and speed_up(frozen[:1], frozen[:1]) is None


def test_time_to_solve_is_kaplan_and_meiers():
    # solved at 10, 20, 20; one stopped unsolved at 15, one at 30: S = 4/5, then 4/5 * (1 - 2/3)
    curve = solve_curve([10, None, 20, 20, None], [30, 15, 30, 30, 30])
    assert curve.times == (10, 20)
    assert curve.unsolved == pytest.approx((0.8, 0.8 / 3))
    assert curve.median == 20


def test_without_a_solution_there_is_no_median():
    curve = solve_curve([None, None, 5], [10, 10, 10])
    assert curve.median is None
    assert solve_curve([None, None], [10, 10]).times == ()
