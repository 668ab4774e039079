"""Power against published tables and counting, and what a study says of it before it runs."""

import math

import numpy as np
import pytest

from dsv3_mtp.study.dryrun import dry_run
from dsv3_mtp.study.power import detectable, detectable_rate, detectables, power
from tests.study.toy import load_toy


@pytest.mark.parametrize(
    ("effect", "n", "published"),
    [(0.5, 34, 0.8078), (0.5, 20, 0.5645), (0.8, 15, 0.8213), (0.2, 199, 0.8017)],
)
def test_power_of_the_paired_t_test_is_that_of_the_published_tables(effect, n, published):
    """G*Power 3.1, paired t test, two-sided, alpha 0.05: dz 0.5 needs 34 pairs, 0.8 needs 15, 0.2
    199.
    """
    assert power(effect, 1.0, n) == pytest.approx(published, abs=0.002)
    if published > 0.8:
        assert power(effect, 1.0, n - 1) < 0.8


def test_power_without_an_effect_is_the_level_and_grows_with_the_effect():
    assert power(0.0, 1.0, 5) == pytest.approx(0.05)
    assert power(-0.3, 0.1, 4) == power(0.3, 0.1, 4) > power(0.2, 0.1, 4)
    assert power(9.0, 0.1, 1) == 0.0 and power(9.0, 0.001, 5) == pytest.approx(1.0)


def test_power_is_the_share_of_simulated_studies_that_find_the_effect():
    draws = np.random.default_rng(0).normal(0.03, 0.03, size=(4000, 5))
    t = draws.mean(1) / (draws.std(1, ddof=1) / math.sqrt(5))
    found = np.mean(np.abs(t) > 2.7764)  # Student's table, 4 degrees of freedom
    assert power(0.03, 0.03, 5) == pytest.approx(found, abs=3 * math.sqrt(0.25 / 4000))


def test_the_smallest_detectable_effect_has_the_power_it_promises_and_scales_with_sd():
    for n in (3, 5, 24):
        assert power(detectable(0.05, n), 0.05, n) == pytest.approx(0.8, abs=1e-6)
    assert detectable(0.1, 5) == pytest.approx(2 * detectable(0.05, 5))
    assert detectable(0.05, 1) == math.inf
    assert detectable(0.05, 5, alpha=0.01) > detectable(0.05, 5)


def test_the_smallest_detectable_rate_is_counted():
    """Six pairs of six are needed for p < 0.05 (2 / 64), whatever n; five never suffice."""
    assert detectable_rate(5) == math.inf
    assert detectable_rate(6) ** 6 == pytest.approx(0.8)
    d = detectable_rate(10)
    found = sum(math.comb(10, k) * d**k * (1 - d) ** (10 - k) for k in range(6, 11))
    assert found == pytest.approx(0.8)


def expecting(tree) -> None:
    tree["seeds"] = [1, 2, 3, 4, 5]
    given = {"effect": 0.03, "sd": 0.05, "source": "a pilot of 1.6M tokens"}
    tree["comparisons"]["heads"]["expected"] = {"val/main_loss": given}
    given = {"effect": {"step": -0.5}, "sd": 0.05, "source": "the same pilot"}
    tree["comparisons"]["schedule"]["expected"] = {"val/main_loss": given}


def test_what_is_smaller_than_detectable_is_called_unresolved_in_advance(tmp_path):
    study = load_toy(tmp_path, expecting).study
    heads, schedule = [d for d in detectables(study) if d.sd is not None]
    assert (
        heads.primary and heads.unresolved and heads.smallest == pytest.approx(detectable(0.05, 5))
    )
    assert not schedule.primary and not schedule.unresolved
    # of 3 exploratory
    assert schedule.smallest == pytest.approx(detectable(0.05, 5, alpha=0.05 / 3))


def test_the_dry_run_says_so_with_the_source(tmp_path):
    text = dry_run(load_toy(tmp_path, expecting), jobs=1)
    line = (
        "UNRESOLVED in advance: constant against none, val/main_loss: expected is +0.03, found is "
    )
    assert f"{line}{detectable(0.05, 5):.3g} or more" in text
    assert "sd of val/main_loss, heads: a pilot of 1.6M tokens" in text
    assert "step against" not in text
