"""Slopes over lengths against scipy, by simulation, and in a study file, its dry run and report."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import scipy

from dsv3_mtp.config import ConfigError
from dsv3_mtp.study.dryrun import dry_run
from dsv3_mtp.study.expand import expand
from dsv3_mtp.study.plan import freeze
from dsv3_mtp.study.power import detectable
from dsv3_mtp.study.report import write_report
from dsv3_mtp.study.trends import slopes_of
from tests.study.toy import load_toy, record_of

SIZES = (512, 1024, 4096)
SEEDS = (1, 2, 3, 4, 5)


def lengths(tree: Any) -> None:
    """Arms with and without heads at three lengths, and a trend over them."""
    tree |= {"seeds": list(SEEDS), "arms": {}, "comparisons": {}, "metrics": [], "acceptance": None}
    for size in SIZES:
        for kind, mode in (("none", "none"), ("chain", "sequential")):
            tree["arms"][f"n{size}_{kind}"] = {
                "about": kind,
                "set": {"mtp.mode": mode, "train.total_tokens": size},
            }
        tree["comparisons"][f"n{size}"] = {
            "against": f"n{size}_none",
            "arms": [f"n{size}_chain"],
            "rule": "added parameters",
            "expected": {"val/main_loss": {"sd": 0.03, "source": "a pilot"}},
        }
    trend = {"by": "tokens", "comparisons": [f"n{s}" for s in reversed(SIZES)], "arms": "*_chain"}
    tree["trends"] = {"length": trend}
    tree["primary"]["comparison"] = "n512"


def table_of(effects: np.ndarray) -> Any:
    """effects: (sizes, seeds) of the chain; every model without heads has another loss."""
    table: Any = {}
    for row, size in zip(effects, SIZES, strict=True):
        for seed, effect in zip(SEEDS, row, strict=True):
            base = 4.0 + 0.1 * seed - size / 5000
            for kind, loss in (("none", base), ("chain", base + effect)):
                record = SimpleNamespace(
                    finished=True, metrics={"val/main_loss": loss}, tokens=size, parameters={}
                )
                table.setdefault(f"n{size}_{kind}", {})[seed] = record
    return table


def effects_of(start: float, slope: float, sd: float, seed: int = 0) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(0, sd, (len(SIZES), len(SEEDS)))
    x = np.log10(SIZES) - np.log10(SIZES[0])
    return start + slope * x[:, None] + noise


def test_slope_and_ends_are_those_of_a_regression_in_each_seed(tmp_path):
    study = load_toy(tmp_path, lengths).study
    effects = effects_of(0.1, -0.3, 0.01)
    (found,) = slopes_of(study, table_of(effects))
    x = np.log10(SIZES)
    lines = [scipy.stats.linregress(x, effects[:, n]) for n in range(len(SEEDS))]
    assert found.slope is not None and found.first is not None and found.last is not None
    slopes = [line.slope for line in lines]
    low, high = scipy.stats.t.interval(0.95, 4, np.mean(slopes), scipy.stats.sem(slopes))
    assert (found.slope.mean, found.slope.low, found.slope.high) == pytest.approx(
        (np.mean(slopes), low, high)
    )
    for end, place in ((found.first, 0), (found.last, -1)):
        assert end.mean == pytest.approx(np.mean([b.intercept + b.slope * x[place] for b in lines]))
    assert found.sizes == SIZES and found.reading == "falls, and changes sign"
    mean = scipy.stats.linregress(x, effects.mean(1))
    assert found.crossing == pytest.approx(10 ** (-mean.intercept / mean.slope))


def test_without_a_slope_the_interval_leaves_out_zero_in_one_of_twenty(tmp_path):
    study, found = load_toy(tmp_path, lengths).study, 0
    for seed in range(400):
        (slope,) = slopes_of(study, table_of(effects_of(0.02, 0.0, 0.03, seed)))
        assert slope.slope is not None
        found += not slope.slope.covers_zero
    assert 0.02 < found / 400 < 0.08


def test_a_fall_that_stays_on_one_side_is_no_change_of_sign(tmp_path):
    study = load_toy(tmp_path, lengths).study
    (above,) = slopes_of(study, table_of(effects_of(0.5, -0.3, 0.01)))
    assert above.crossing is None and above.reading == "falls; a change of sign is not shown"
    (flat,) = slopes_of(study, table_of(effects_of(0.0, 0.0, 0.01)))
    assert flat.reading.endswith("no change with tokens is shown")


def test_seeds_without_every_size_are_left_out_and_two_conclude_nothing(tmp_path):
    study, table = load_toy(tmp_path, lengths).study, table_of(effects_of(0.1, -0.3, 0.01))
    del table["n1024_chain"][2], table["n4096_none"][3], table["n512_none"][5]
    (found,) = slopes_of(study, table)
    assert found.slope is not None and found.slope.n == 2 and found.reading == "too few seeds"
    del table["n4096_chain"]
    (none,) = slopes_of(study, table)
    assert none.slope is None and none.reading == "too few seeds"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"comparisons": ["n512", "n99"]}, "there is no comparison 'n99'; there are n512, n1024"),
        ({"arms": "*_none"}, "must fit one arm of the comparison 'n4096' .got none"),
        ({"comparisons": ["n512", "n512"]}, "trends.length.comparisons: must differ"),
        ({"comparisons": ["n512"]}, "trends.length.comparisons"),
        ({"by": "width"}, "trends.length.by"),
    ],
)
def test_a_wrong_trend_is_named(tmp_path, change, message):
    def wrong(tree: Any) -> None:
        lengths(tree)
        tree["trends"]["length"] |= change

    with pytest.raises(ConfigError, match=message):
        load_toy(tmp_path, wrong)


def test_dry_run_and_report_say_what_the_trend_can_find_and_what_was_found(tmp_path):
    loaded = load_toy(tmp_path, lengths)
    x = np.log10(SIZES)
    sd = 0.03 / np.sqrt(((x - x.mean()) ** 2).sum())
    smallest = detectable(float(sd), 5)
    assert f"trend length: a slope of {smallest:.3g} per tenfold tokens" in dry_run(loaded, jobs=1)
    table = table_of(effects_of(0.1, -0.3, 0.01))
    records = [
        record_of(loaded, run, table[run.arm][run.seed].metrics) for run in expand(loaded, {})
    ]
    loaded.study.folder.mkdir(parents=True)
    report = write_report(loaded, freeze(loaded, 0), records, tmp_path / "report")
    text = report.read_text()
    first, _, rest = text.partition("## Setup")
    assert "Trend length: falls, and changes sign" in first and "## Trends" in rest
    assert "| length | 512 to 4.10k tokens | 5 | -0." in rest
