"""The report says what the results are and no more: made from results written by hand."""

import json
import re
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from dsv3_mtp.study.archive import Curve, read_results, table_of, write_results
from dsv3_mtp.study.expand import expand
from dsv3_mtp.study.findings import Effect, effects_of
from dsv3_mtp.study.folder import records_of, report_study
from dsv3_mtp.study.load import load_study
from dsv3_mtp.study.matrix import Primary
from dsv3_mtp.study.measure import loss_error_metrics, loss_errors
from dsv3_mtp.study.page import Rows, to_markdown
from dsv3_mtp.study.pictures.base import PictureData
from dsv3_mtp.study.pictures.outcome import draw_answer, draw_depths, draw_effects
from dsv3_mtp.study.pictures.training import draw_losses
from dsv3_mtp.study.stats import t_interval
from dsv3_mtp.study.tables import reading
from dsv3_mtp.study.words import verdict
from tests.study.toy import five_seeds, load_toy, write_run, write_runs, write_toy


@pytest.fixture
def no_pictures(monkeypatch):
    monkeypatch.setattr("dsv3_mtp.study.report.draw_all", lambda data, folder: [("answer.png", "")])
    monkeypatch.setattr("dsv3_mtp.study.hover.live", lambda data: None)
    monkeypatch.setattr("dsv3_mtp.study.page.to_html", lambda *_, **__: "")


@pytest.fixture
def report(tmp_path, no_pictures):
    """A function from losses to the report's text, without pictures."""

    def make(losses, change=five_seeds, after=lambda loaded: None) -> str:
        loaded = load_toy(tmp_path, change)
        write_runs(loaded, losses)
        after(loaded)
        return report_study(loaded).read_text()

    return make


def edit(loaded, name, **update) -> None:
    """Changes fields of a run's record; metrics are added."""
    folder = loaded.study.folder / name
    record = read_results(folder)
    assert record is not None
    if "metrics" in update:
        update["metrics"] = record.metrics | update["metrics"]
    write_results(folder, record.model_copy(update=update))


def line_of(text: str, start: str) -> str:
    return next(line for line in text.splitlines() if line.startswith(start))


def test_the_first_screen_is_question_answer_picture_and_what_is_not_shown(report):
    text = report({"none": 4.0, "constant": 4.1, "step": 4.1})
    marks = ["# toy", "## Question", "Does it work?", "## Answer", "Main validation loss"]
    marks += ["![](answer.png)", "## What it does not show", "## Setup"]
    places = [text.index(mark) for mark in marks]
    assert places == sorted(places) and places[-1] < 1800


def test_an_interval_without_zero_is_a_difference_with_its_direction(report):
    text = report({"none": 4.0, "constant": 4.1, "step": 4.1})
    line = line_of(text, "- constant against none")
    assert "higher, +0.1006" in line and "which is worse" in line and "n = 5" in line
    assert "Higher, which is worse: constant (+0.101 [+0.0" in text


def test_an_interval_that_covers_zero_is_no_detectable_difference(report):
    text = report({"none": 4.0, "constant": 3.9997, "step": 4.1})
    line = line_of(text, "- constant against none")
    assert "no detectable difference" in line and "shown to be within +-0.01" in line
    assert "not shown" not in line and "Equal within +-0.01: constant" in text


def test_a_wide_interval_is_not_called_equal(report):
    def wide(loaded):
        for run in expand(loaded, {}):
            if run.arm == "constant":
                write_run(loaded, run, {"val/main_loss": 4.0 + (run.seed - 3) * 0.1})

    line = line_of(report({"none": 4.0, "constant": 4.0}, after=wide), "- constant against none")
    assert "no detectable difference" in line and "not shown to be within +-0.01" in line


@pytest.mark.parametrize(
    ("expected", "loss", "words"),
    [
        (0.1, 4.1, "as expected"),
        (-0.1, 4.1, "against the expectation of -0.1"),
        (0.3, 4.0, "against the expectation of +0.3, which the interval leaves out"),
        (0.0, 4.1, "against the expectation of no difference"),
        (0.0, 3.9997, "as expected"),
        (0.0005, 3.9999, "expected was +0.0005: not resolved"),
    ],
)
def test_verdicts_say_how_they_lie_to_the_expectation(report, expected, loss, words):
    def expect(tree):
        five_seeds(tree)
        given = {"effect": {"constant": expected}, "source": "a guess"}
        tree["comparisons"]["heads"]["expected"] = {"val/main_loss": given}

    text = report({"none": 4.0, "constant": loss}, expect)
    assert f"; {words}" in line_of(text, "- constant against none")
    assert words in line_of(text, "| constant (primary)")


def test_runs_of_other_settings_are_not_reported_as_the_studys(report):
    def change(loaded):
        run = expand(loaded, {})[0]
        optim = run.config.optim.model_copy(update={"lr": 0.5})
        other = run.config.model_copy(update={"optim": optim})
        (loaded.study.folder / run.name / "config.yaml").write_text(other.to_yaml())

    with pytest.raises(ValueError, match=r"config\.yaml: optim\.lr is 0\.5, the study says"):
        report({"none": 4.0, "constant": 4.0, "step": 4.0}, after=change)


def test_runs_that_were_measured_with_other_settings_do_not_count(report):
    def change(loaded):
        measured = read_results(loaded.study.folder / "step-seed2").measured
        measured["acceptance"]["prefixes"] += 1
        edit(loaded, "step-seed2", measured=measured)

    text = report({"none": 4.0, "constant": 4.0, "step": 4.0}, after=change)
    assert "14 runs finished" in text and "step: no result with seed 2" in text


@pytest.mark.parametrize(("seeds", "words"), [([1], "one seed"), ([1, 2], "2 seeds")])
def test_fewer_than_three_seeds_conclude_nothing(report, seeds, words):
    def few(tree):
        five_seeds(tree)
        tree["seeds"] = seeds

    text = report({"none": 4.0, "constant": 5.0, "step": 5.0}, few)
    assert f"with {words}: no conclusion" in text
    assert "No conclusion from fewer than 3 seeds: constant (+1)" in text
    assert "too few seeds" in line_of(text, "| step | val/main_loss")
    for word in ("higher", "Higher", "lower,", "hint", "nan", "No detectable"):
        assert word not in text, word


@pytest.mark.parametrize(("lost", "size"), [([], "against none, n = 5."), ([2], "], n = 4)")])
def test_the_answer_says_how_many_seeds_it_is_from(report, lost, size):
    def both(tree):
        five_seeds(tree)
        tree["comparisons"]["heads"]["arms"] = ["constant", "step"]

    def diverge(loaded):
        for run in expand(loaded, {}):
            if run.arm == "step" and run.seed in lost:
                write_run(loaded, run, {}, status="diverged", error="train/loss = nan")

    text = report({"none": 4.0, "constant": 4.1, "step": 4.1}, both, after=diverge)
    assert size in line_of(text, "Main validation loss")
    assert ("], n = 5)" in line_of(text, "Main validation loss")) == bool(lost)


@pytest.mark.parametrize("arm", ["constant", "none"])
def test_diverged_runs_are_listed_and_count_and_missing_ones_are_listed(report, arm):
    """A run of the arm that is compared against counts against that one, not its challenger."""

    def diverge(loaded):
        run = next(run for run in expand(loaded, {}) if run.name == f"{arm}-seed2")
        write_run(loaded, run, {}, status="diverged", error="train/loss = nan")

    text = report({"none": 4.0, "constant": 4.1}, after=diverge)
    line = line_of(text, "- constant against none")
    assert "n = 4" in line
    assert f"Left out, which counts against their arm: {arm} seed 2 diverged." in line
    assert f"- {arm} seed 2 diverged" in text
    assert "- step: no result with seed 1, 2, 3, 4, 5" in text
    assert "9 runs finished of 3 arms x 5 seeds" in text


def test_exploratory_effects_are_corrected_together_and_primary_ones_apart(tmp_path):
    loaded = load_toy(tmp_path, five_seeds)
    write_runs(loaded, {"none": 4.0, "constant": 4.1, "step": 4.2})
    table = table_of(loaded.study.arms, loaded.study.seeds, records_of(loaded))
    effects = effects_of(loaded.study, table)
    primary = [e for e in effects if (e.comparison, e.metric) == ("heads", "val/main_loss")]
    rest = [e for e in effects if e not in primary and e.interval is not None]
    assert len(primary) == 1 and primary[0].adjusted_p == primary[0].p
    assert len(rest) >= 3
    assert min(e.adjusted_p for e in rest) == pytest.approx(len(rest) * min(e.p for e in rest))
    assert "Holm" in verdict(rest[0], margin=None, lost_runs=[]) or rest[0].interval.covers_zero


def test_solve_rates_are_paired_and_solve_times_are_tested(report):
    """6 of 6 pairs: McNemar's exact p is 2 / 2**6; with 5 it could not have been below 0.05."""

    def solve(loaded):
        for run in expand(loaded, {}):
            won = run.arm == "constant"
            solved_at = 300 if won else None
            edit(loaded, run.name, metrics={"task/solved": float(won)}, solved_at=solved_at)

    def ask(tree):
        five_seeds(tree)
        tree["seeds"] = [1, 2, 3, 4, 5, 6]
        tree["primary"]["metric"] = "task/solved"
        task = {"type": "suffix_sum", "terms": 6}
        tree["set"] = {"data.task": task, "data.train": None, "data.val": None}
        tree["solve_threshold"] = 0.9

    def write(loaded):
        for run in expand(loaded, {}):
            write_run(loaded, run, {"val/main_loss": 4.0})
        solve(loaded)

    text = report({}, ask, after=write)
    assert "the last answer of each of 2 validation examples" in text
    assert "0 of 6 [0.00, 0.46]" in text and "6 of 6 [0.54, 1.00]" in text
    assert "a difference, +1.00, n = 6 (McNemar p = 0.0312, Holm p = 0.0312)" in text
    assert "| constant | none | 6 of 6 | 0 of 6 | 0.0312 | 0.0938 |" in text


def test_a_low_loss_of_a_head_raises_the_leak_alarm(report):
    def leak(loaded):
        main = read_results(loaded.study.folder / "step-seed1").metrics["val/main_loss"]
        edit(loaded, "step-seed1", metrics={"val/mtp_loss/1": 0.7 * main})

    text = report({"none": 4.0, "constant": 4.1, "step": 4.1}, after=leak)
    assert "Leak alarm: the loss" in text and "- step, seed 1: val/mtp_loss/1" in text


def test_report_has_the_setup_and_what_honesty_asks_for(report):
    text = report({"none": 4.0, "constant": 4.1, "step": 4.1})
    for part in (
        "Expected then: It does.",
        "far below the scale of the papers",
        "the study does not say for which arm it was tuned",
        "these floors were not measured",
        "Leak alarm (a depth's loss below 0.8 of the main loss): none.",
        "commit abc; uncommitted changes: none",
        "x 0123456789ab",
        "constant at step 4",
        "free-running",
        "Nothing was changed since.",
    ):
        assert part in text, part
    assert not re.search(r"top1[^\n]*acceptance|acceptance[^\n]*top1", text)


def test_the_learning_rate_and_the_authors_limits_are_told(report):
    def say(tree):
        five_seeds(tree)
        tree["learning_rate"] = {"tuned_for": "none", "source": "five rates, three seeds"}
        tree["limits"] = "Other tokenizers."

    text = report({"none": 4.0, "constant": 4.1}, say)
    assert "- Other tokenizers." in text
    assert "the learning rate was tuned for none (five rates, three seeds)" in text


def test_the_sd_over_draws_stands_beside_that_over_seeds(report):
    def spread(loaded):
        for run in expand(loaded, {}):
            if run.arm == "constant":
                edit(loaded, run.name, draw_sd={"acceptance/T1/tokens_per_step": 0.125})

    text = report({"none": 4.0, "constant": 4.1, "step": 4.1}, after=spread)
    assert "1.5000 +- 0.0196 (5) [0.125 / 0.016]" in line_of(text, "| constant | 4.1")


def test_trunks_that_were_trained_apart_are_compared_by_the_pair(report):
    """Overlap alone would reward the worse trunk."""

    def measure(loaded):
        for run in expand(loaded, {}):
            if run.arm != "none":
                table = 0.8 if run.arm == "constant" else 0.7
                found = {"val/overlap/1": 0.9, "val/floor/overlap/table/1": table}
                edit(loaded, run.name, metrics=found | {"val/overlap_above_table/1": 0.9 - table})

    text = report({"none": 4.0, "constant": 4.1, "step": 4.2}, after=measure)
    row = line_of(text, "| step | 1 | +0.1")
    assert "| +0.1000 [+0.1000, +0.1000] | +0.0000 [+0.0000, +0.0000] |" in row
    assert "| constant | 1 | 0.900 | - | 0.800 |" in text


def test_tokens_to_equal_loss_stand_beside_loss_differences(report):
    """By hand: constant ends 0.1 lower, and has reached the other's end at the fourth of five
    points.
    """

    def curve(loaded):
        for run in expand(loaded, {}):
            end = {"none": 4.0, "constant": 3.9, "step": 3.9}[run.arm]
            points = [end + (5 - n) / 10 for n in range(1, 6)]
            curves = {"val/main_loss": Curve(tokens=[100, 200, 300, 400, 500], values=points)}
            edit(loaded, run.name, curves=curves)

    text = report({"none": 4.0, "constant": 3.9, "step": 3.9}, after=curve)
    assert line_of(text, "| constant (primary)").endswith("| 1.25x |")


def test_a_cell_of_several_lines_is_one_line_of_its_table():
    text = to_markdown([Rows(["a", "b"], [["x | y\nz", "1"]])])
    assert text.splitlines()[-1] == "| x \\| y z | 1 |"


@pytest.mark.parametrize(("metric", "lines"), [("task/solved", 0), ("task/first_sum", 1)])
def test_no_t_interval_is_drawn_of_a_solve_rate(metric, lines):
    """3 of 3 against 0 of 3: the t interval is [1, 1], McNemar's p 0.25."""
    effect = Effect("heads", "a", "b", metric, t_interval([1.0, 1.0, 1.0]), 0.1, 0.1, None, 0, 0.0)
    primary = Primary(metric="x", comparison="heads", margin=0.1)
    study: Any = SimpleNamespace(primary=primary, arms={"a": 0, "b": 0})
    figure = draw_effects(PictureData(study, {}, {}, [effect]))
    drawn = [
        len(line.get_xdata()) == 2 and line.get_linewidth() == 2.5 for line in figure.axes[0].lines
    ]
    assert sum(drawn) == lines


def test_what_is_the_same_to_the_last_bit_is_called_identical():
    effect = Effect(
        "c", "a", "b", "val/main_loss", t_interval([0.0] * 3), 1, 1, None, 0, 0, False, 0.0
    )
    assert reading(effect) == "identical; as expected"
    near = replace(effect, interval=t_interval([0.0, 1e-9, -1e-9]))
    assert reading(near) == "not detectable; expected was no difference, not shown"


def test_depths_are_whole_numbers_and_what_was_not_measured_has_no_panel(tmp_path):
    loaded = load_toy(tmp_path)
    write_runs(loaded, {"none": 4.0, "constant": 4.1, "step": 4.2})
    table = table_of(loaded.study.arms, loaded.study.seeds, records_of(loaded))
    figure = draw_depths(PictureData(loaded.study, loaded.configs, table, []))
    assert len(figure.axes) == 3  # overlap was not measured
    for ax in figure.axes:
        assert ax.get_xticks().tolist() == [1] and ax.get_xlim() == (0.5, 1.5)
        for container in ax.containers:
            assert abs(container[0].get_xdata()[0] - 1) < 0.13


def test_every_override_is_in_the_report_at_its_full_length(tmp_path, no_pictures):
    points = {"type": "piecewise", "points": [[n / 20, n / 10] for n in range(20)]}

    def long(tree):
        tree["arms"]["step"]["set"].update({"mtp.loss_weight": points})

    sets = ["optim.lr=0.0012345", "optim.weight_decay=0.0123456", "optim.grad_clip=0.5"]
    loaded = load_study(write_toy(tmp_path, long), sets)
    run = next(run for run in expand(loaded, {}) if run.arm == "step")
    write_run(loaded, run, {"val/main_loss": 4.0})
    text = report_study(loaded).read_text()
    assert all(part in text for part in [*sets, json.dumps(points)])


def test_the_relative_loss_error_is_v3s_against_the_reference_run_of_the_same_seed(report):
    def ask(tree):
        five_seeds(tree)
        tree["loss_error_against"] = "none"
        tree["primary"] |= {"metric": "train/main_loss_error", "margin": 0.25}

    def log(loaded):
        for run in expand(loaded, {}):
            factor = 1.001 if run.arm == "constant" else 1
            # another base per seed
            losses = [(4 + 1 / n + run.seed) * factor for n in range(1, 41)]
            curve = Curve(tokens=[10 * n for n in range(1, 41)], values=losses)
            edit(loaded, run.name, curves={"train/main_loss": curve}, tokens=400)

    text = report({"none": 4.0, "constant": 4.1, "step": 4.1}, ask, after=log)
    line = line_of(text, "- constant against none")
    assert "higher, +0.1 [+0.1, +0.1], n = 5" in line and "shown to be within +-0.25" in line
    assert "not shown" not in line and "| none | 0.0000 +- 0.0000 (5) |" in text


def test_losses_are_smoothed_with_the_weights_written_out():
    ours, reference = [3.0, 2.0, 5.0, 1.0], [2.0, 2.0, 2.0, 2.0]
    sides = [
        {"train/mtp_loss/1": Curve(tokens=[0, 1, 2, 3], values=losses)}
        for losses in (ours, reference)
    ]
    errors = loss_errors(*sides)["train/mtp_loss/1"]
    last = 0.9**3 * 3 + 0.1 * (0.81 * 2 + 0.9 * 5 + 1)
    expected = [50, 45, 100 * (0.81 * 3 + 0.09 * 2 + 0.5) / 2 - 100, 50 * last - 100]
    assert list(errors.values()) == pytest.approx(expected)
    metrics = loss_error_metrics(*sides, total_tokens=3)
    found = {"train/mtp_loss_error/1": 50 * last - 100, "train/mtp_loss_error_max/1": 55.5}
    assert metrics == pytest.approx(found)


def test_what_makes_a_study_uninterpretable_is_the_first_line(report):
    def floors(loaded):
        for run in expand(loaded, {}):
            edit(loaded, run.name, metrics={"val/floor/trigram": 3.0})

    text = report({"none": 4.0, "constant": 4.1, "step": 4.1}, after=floors)
    first = text.splitlines()[0]
    assert first.startswith("Not interpretable: the main models of both arms (4.000 to 4.101 nats)")
    assert "| none | 4.000 | - | - | 3.000 |" in text  # the floors stand in a table


def test_no_picture_without_anything_in_it(tmp_path):
    """No row of the answer has a result; heads on a frozen trunk leave the main loss as it is."""
    loaded = load_toy(tmp_path, five_seeds)

    def data() -> PictureData:
        table = table_of(loaded.study.arms, loaded.study.seeds, records_of(loaded))
        return PictureData(loaded.study, loaded.configs, table, effects_of(loaded.study, table))

    write_runs(loaded, {"none": 4.0})
    assert draw_answer(data()) is None
    write_runs(loaded, {"none": 4.0, "constant": 4.1})
    assert draw_answer(data()) is not None and len(draw_losses(data()).axes) == 2
    for seed in loaded.study.seeds:
        none = read_results(loaded.study.folder / f"none-seed{seed}")
        edit(loaded, f"constant-seed{seed}", curves=none.curves)
    assert len(draw_losses(data()).axes) == 1


def a_grid(tree) -> None:
    tree["grid"] = {
        "axes": {
            "w": {"key": "mtp.loss_weight", "values": [0.1, 0.2]},
            "kind": {"key": "mtp.mode", "values": {f"k{n}": "sequential" for n in range(8)}},
        }
    }


def test_a_grid_of_two_axes_has_a_table_of_both_and_pictures_of_the_primary_arms(report):
    losses = {f"w{w}_k{n}": 4 + w + n / 2 for w in (0.1, 0.2) for n in range(8)}
    text = report({"none": 4.0, "constant": 4.1, "step": 4.2} | losses, a_grid)
    assert "| w \\ kind | k0 | k1 |" in text
    cells = line_of(text, "| w0.2 |").split(" | ")
    assert float(cells[3].split()[0]) == pytest.approx(5.2, abs=0.05)
    assert "Of 19 arms 2 are drawn, those of the primary comparison" in text


def test_a_study_without_a_grid_draws_all_its_arms(report):
    text = report({"none": 4.0, "constant": 4.1, "step": 4.2})
    assert "are drawn" not in text and "Every w with" not in text


@pytest.mark.parametrize("drafting", [["constant"], ["none", "constant"]])
def test_overlaps_of_trunks_trained_apart_are_set_beside_both_that_have_them(report, drafting):
    def add_overlaps(loaded):
        for run in expand(loaded, {}):
            if run.arm in drafting:
                value = 0.5 + run.seed / 100 + 0.1 * (run.arm == "constant")
                overlaps = {"val/overlap/1": value, "val/overlap_above_table/1": value - 0.3}
                edit(loaded, run.name, metrics=overlaps)

    text = report({"none": 4.0, "constant": 4.1, "step": 4.1}, after=add_overlaps)
    row = "| +0.1000 [+0.1000, +0.1000] | +0.1000 [+0.1000, +0.1000] |"
    assert (row in text) == ("trained apart, and overlap falls" in text) == (len(drafting) == 2)
