"""The report says what the results are and no more: made from results written by hand, looked at in
a browser.
"""

import json
import re
import shutil
import subprocess
from types import SimpleNamespace
from typing import Any

import pytest

from dsv3_mtp.study.expand import expand
from dsv3_mtp.study.findings import Effect, effects_of, verdict
from dsv3_mtp.study.load import load_study
from dsv3_mtp.study.matrix import Primary
from dsv3_mtp.study.measure import describe, loss_error_metrics, loss_errors, write_results
from dsv3_mtp.study.page import Rows, to_markdown
from dsv3_mtp.study.pictures import Data, draw_depths, draw_effects
from dsv3_mtp.study.report import write_report
from dsv3_mtp.study.run import settings_of
from dsv3_mtp.study.stats import t_interval
from tests.study.toy import load_toy, write_toy

START = {
    "git": "abc", "git_dirty": False, "versions": {"torch": "2", "deepspeed": "0"}, "python": "3", "device": "cpu",
    "threads": 1, "data": {"val": {"path": "x", "manifest_hash": "0123456789abcdef"}},
}  # fmt: skip


def five_seeds(tree):
    tree["seeds"] = [1, 2, 3, 4, 5]
    tree["metrics"] = ["acceptance/T1/tokens_per_step"]
    tree["comparisons"]["drafting"] = {
        "against": "constant",
        "arms": ["step"],
        "rule": "same model",
    }


def write_run(loaded, run, metrics, **more) -> None:
    folder = loaded.study.folder / run.name
    folder.mkdir(parents=True)
    results = describe(run, settings=settings_of(loaded.study)) | {
        "status": "finished",
        "metrics": metrics,
    }
    write_results(folder, results | {"seconds_per_token": 1e-3} | more)
    (folder / "manifest.json").write_text(json.dumps({"starts": [START]}))
    lines = [
        {"step": n, "tokens": 100 * n, "progress": n / 5, "val/main_loss": 5 - n / 10}
        for n in range(1, 6)
    ]
    lines = [line | {"moe/max_violation": 1.0} for line in lines]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


NOISE = (0.0, 0.02, -0.01, 0.01, -0.02)
JITTER = (0.003, -0.001, 0.002, -0.002, 0.001)


def write_runs(loaded, losses, *, drafts=1.5) -> None:
    """losses: arm -> main loss of its mean seed, None where the arm has not been run."""
    for run in expand(loaded, {}):
        if losses.get(run.arm) is not None:
            n = run.seed - 1
            value = losses[run.arm] + NOISE[n] + (JITTER[n] if run.arm != "none" else 0.0)
            metrics = {"val/main_loss": value}
            if run.arm != "none":
                loss = {
                    "val/mtp_loss/1": value + 0.1,
                    "acceptance/T0/joint/1": 0.5,
                    "acceptance/T1/joint/1": 0.6,
                }
                metrics |= loss | {
                    f"acceptance/T{t}/tokens_per_step": drafts + NOISE[n] for t in (0, 1)
                }
            write_run(loaded, run, metrics)


@pytest.fixture
def report(tmp_path, monkeypatch):
    """A function from losses to the report's text, without pictures."""
    monkeypatch.setattr("dsv3_mtp.study.report.draw_all", lambda *_: [])

    def make(losses, change=five_seeds, after=lambda loaded: None) -> str:
        loaded = load_toy(tmp_path, change)
        write_runs(loaded, losses)
        after(loaded)
        return write_report(loaded).read_text()

    return make


def test_an_interval_without_zero_is_a_difference_with_its_direction(report):
    text = report({"none": 4.0, "constant": 4.1, "step": 4.1})
    line = next(line for line in text.splitlines() if line.startswith("- Primary"))
    assert (
        "constant against none" in line and "higher, +0.1006" in line and "which is worse" in line
    )
    assert "n = 5" in line


def test_an_interval_that_covers_zero_is_no_detectable_difference(report):
    text = report({"none": 4.0, "constant": 3.9997, "step": 4.1})
    line = next(line for line in text.splitlines() if line.startswith("- Primary"))
    assert (
        "no detectable difference" in line
        and "shown to be within +-0.01" in line
        and "not shown" not in line
    )


def test_a_wide_interval_is_not_called_equal(report):
    def wide(loaded):
        for run in expand(loaded, {}):
            if run.arm == "constant":
                shutil.rmtree(loaded.study.folder / run.name)
                write_run(loaded, run, {"val/main_loss": 4.0 + (run.seed - 3) * 0.1})

    line = next(
        x
        for x in report({"none": 4.0, "constant": 4.0}, after=wide).splitlines()
        if x.startswith("- Primary")
    )
    assert "no detectable difference" in line and "not shown to be within +-0.01" in line


def test_runs_of_other_settings_are_not_reported_as_the_studys(report):
    def change(loaded):
        run = expand(loaded, {})[0]
        other = run.config.model_copy(
            update={"optim": run.config.optim.model_copy(update={"lr": 0.5})}
        )
        (loaded.study.folder / run.name / "config.yaml").write_text(other.to_yaml())

    with pytest.raises(ValueError, match=r"config\.yaml: optim\.lr is 0\.5, the study says"):
        report({"none": 4.0, "constant": 4.0, "step": 4.0}, after=change)


def test_runs_that_were_measured_with_other_settings_do_not_count(report):
    def change(loaded):
        path = loaded.study.folder / "step-seed2" / "results.json"
        results = json.loads(path.read_text())
        results["settings"]["acceptance"]["prefixes"] += 1
        path.write_text(json.dumps(results))

    text = report({"none": 4.0, "constant": 4.0, "step": 4.0}, after=change)
    assert "14 runs finished" in text and "step: no result with seed 2" in text


def test_one_seed_concludes_nothing(report):
    def one(tree):
        five_seeds(tree)
        tree["seeds"] = [1]

    text = report({"none": 4.0, "constant": 5.0, "step": 5.0}, one)
    assert "+1.003 with one seed: no conclusion" in text
    assert "higher," not in text and "lower," not in text and "hint" not in text
    assert "- One seed, so no conclusion, in " in text
    assert "No detectable difference" not in text and "nan" not in text


@pytest.mark.parametrize("arm", ["constant", "none"])
def test_diverged_runs_are_listed_and_count_and_missing_ones_are_listed(report, arm):
    """A run of the arm that is compared against counts against that one, not against its
    challenger.
    """

    def diverge(loaded):
        for run in expand(loaded, {}):
            if run.name == f"{arm}-seed2":
                shutil.rmtree(loaded.study.folder / run.name)
                write_run(loaded, run, {}, status="diverged", error="train/loss = nan")

    text = report({"none": 4.0, "constant": 4.1}, after=diverge)
    line = next(line for line in text.splitlines() if line.startswith("- Primary"))
    assert (
        "n = 4" in line
        and f"Left out, which counts against their arm: {arm} seed 2 diverged." in line
    )
    assert (
        f"- {arm} seed 2 diverged" in text and "- step: no result with seed 1, 2, 3, 4, 5" in text
    )
    assert "9 runs finished of 3 arms x 5 seeds" in text


def test_exploratory_effects_are_corrected_together_and_primary_ones_apart(tmp_path):
    loaded = load_toy(tmp_path, five_seeds)
    write_runs(loaded, {"none": 4.0, "constant": 4.1, "step": 4.2})
    table = {arm: {} for arm in loaded.study.arms}
    for run in expand(loaded, {}):
        table[run.arm][run.seed] = json.loads(
            (loaded.study.folder / run.name / "results.json").read_text()
        )
    effects = effects_of(loaded.study, table)
    primary = [e for e in effects if (e.comparison, e.metric) == ("heads", "val/main_loss")]
    rest = [e for e in effects if e not in primary and e.interval is not None]
    assert len(primary) == 1 and primary[0].adjusted_p == primary[0].p
    assert len(rest) >= 3 and min(e.adjusted_p for e in rest) == pytest.approx(
        len(rest) * min(e.p for e in rest)
    )
    assert "Holm" in verdict(rest[0], margin=None, lost_runs=[]) or rest[0].interval.covers_zero


def test_solve_rates_have_exact_intervals_and_fishers_test(report):
    def solve(loaded):
        for run in expand(loaded, {}):
            path = loaded.study.folder / run.name / "results.json"
            results = json.loads(path.read_text())
            won = run.arm == "constant"
            results["metrics"]["task/solved"] = float(won)
            path.write_text(json.dumps(results | {"solved_at": 300 if won else None}))

    def ask(tree):
        five_seeds(tree)
        tree["primary"]["metric"] = "task/solved"
        tree["set"] = {
            "data.task": {"type": "suffix_sum", "terms": 6},
            "data.train": None,
            "data.val": None,
        }
        tree["solve_threshold"] = 0.9

    text = report({"none": 4.0, "constant": 4.1, "step": 4.1}, ask, after=solve)
    assert "the last answer of each of 2 validation examples" in text
    assert "0 of 5 [0.00, 0.52]" in text and "5 of 5 [0.48, 1.00]" in text
    assert "a difference, +1.00 (Fisher p = 0.00794, Holm p = 0.00794)" in text


def test_a_low_loss_of_a_head_raises_the_leak_alarm(report):
    def leak(loaded):
        path = loaded.study.folder / "step-seed1" / "results.json"
        results = json.loads(path.read_text())
        results["metrics"]["val/mtp_loss/1"] = 0.7 * results["metrics"]["val/main_loss"]
        path.write_text(json.dumps(results))

    text = report({"none": 4.0, "constant": 4.1, "step": 4.1}, after=leak)
    assert "Leak alarm: the loss" in text and "- step, seed 1: val/mtp_loss/1" in text


def test_report_has_the_setup_and_what_honesty_asks_for(report):
    text = report({"none": 4.0, "constant": 4.1, "step": 4.1})
    for part in (
        "Expected, written before the runs: It does.",
        "calibrate.yaml has not been run",
        "far below the scale of the papers",
        "Leak alarm (a depth's loss below 0.8 of the main loss): none.",
        "commit abc; uncommitted changes: False",
        "x 0123456789ab",
        "constant at step 4",
        "free-running",
    ):
        assert part in text, part
    assert not re.search(r"top1[^\n]*acceptance|acceptance[^\n]*top1", text)


def test_a_cell_of_several_lines_is_one_line_of_its_table():
    assert (
        to_markdown([Rows(["a", "b"], [["x | y\nz", "1"]])]).splitlines()[-1] == "| x \\| y z | 1 |"
    )


@pytest.mark.parametrize(("metric", "lines"), [("task/solved", 0), ("task/first_sum", 1)])
def test_no_t_interval_is_drawn_of_a_solve_rate(metric, lines):
    """3 of 3 against 0 of 3: the t interval is [1, 1], Fisher's p 0.1."""
    effect = Effect("heads", "a", "b", metric, t_interval([1.0, 1.0, 1.0]), 0.1, 0.1, None, 0, 0.0)
    study: Any = SimpleNamespace(primary=Primary(metric="x", comparison="heads", margin=0.1))
    figure = draw_effects(Data(study, {}, {}, {}, [effect]))
    assert (
        sum(
            len(line.get_xdata()) == 2 and line.get_linewidth() == 2
            for line in figure.axes[0].lines
        )
        == lines
    )


def test_depths_are_whole_numbers_and_what_was_not_measured_has_no_panel():
    table: Any = {
        arm: {1: {"status": "finished", "metrics": {"val/mtp_loss/1": 4.0}}}
        for arm in ("a", "b", "c")
    }
    figure = draw_depths(Data(SimpleNamespace(arms=table), {}, table, {}, []))  # type: ignore[arg-type]
    assert [ax.get_xticks().tolist() for ax in figure.axes] == [[1]]


def test_every_override_is_in_the_report_at_its_full_length(tmp_path, monkeypatch):
    monkeypatch.setattr("dsv3_mtp.study.report.draw_all", lambda *_: [])
    points = {"type": "piecewise", "points": [[n / 20, n / 10] for n in range(20)]}
    path = write_toy(
        tmp_path, lambda tree: tree["arms"]["step"]["set"].update({"mtp.loss_weight": points})
    )
    sets = [
        "optim.lr=0.0012345",
        "optim.weight_decay=0.0123456",
        "optim.grad_clip=0.5",
        "train.bias_update_speed=0.01",
    ]
    loaded = load_study(path, sets)
    write_run(
        loaded, next(run for run in expand(loaded, {}) if run.arm == "step"), {"val/main_loss": 4.0}
    )
    text = write_report(loaded).read_text()
    assert all(part in text for part in [*sets, json.dumps(points)])


def test_the_relative_loss_error_is_v3s_against_the_reference_run_of_the_same_seed(report):
    def ask(tree):
        five_seeds(tree)
        tree["loss_error_against"] = "none"
        tree["primary"] |= {"metric": "train/main_loss_error", "margin": 0.25}

    def log(loaded):
        for run in expand(loaded, {}):
            records = [{"step": n, "tokens": 10 * n, "progress": n / 40} for n in range(1, 41)]
            for record in records:
                loss = 4 + 1 / record["step"] + run.seed  # another base for every seed
                record["train/main_loss"] = loss * (1.001 if run.arm == "constant" else 1)
            path = loaded.study.folder / run.name / "metrics.jsonl"
            path.write_text("".join(json.dumps(record) + "\n" for record in records))

    text = report({"none": 4.0, "constant": 4.1, "step": 4.1}, ask, after=log)
    line = next(line for line in text.splitlines() if line.startswith("- Primary"))
    assert "higher, +0.1 [+0.1, +0.1], n = 5" in line and "shown to be within +-0.25" in line
    assert "not shown" not in line and "| none | 0.0000 +- 0.0000 (5) |" in text


def test_losses_are_smoothed_with_the_weights_written_out():
    ours, reference = [3.0, 2.0, 5.0, 1.0], [2.0, 2.0, 2.0, 2.0]
    sides = [[{"tokens": n, "progress": n / 3, "train/mtp_loss/1": loss} for n, loss in enumerate(losses)]
             for losses in (ours, reference)]  # fmt: skip
    errors = loss_errors(*sides)["train/mtp_loss/1"]
    last = 0.9**3 * 3 + 0.1 * (0.81 * 2 + 0.9 * 5 + 1)
    assert list(errors.values()) == pytest.approx(
        [50, 45, 100 * (0.81 * 3 + 0.09 * 2 + 0.5) / 2 - 100, 50 * last - 100]
    )
    metrics = loss_error_metrics(*sides)
    assert metrics == pytest.approx(
        {"train/mtp_loss_error/1": 50 * last - 100, "train/mtp_loss_error_max/1": 55.5}
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of a whole report."""
    loaded = load_toy(tmp_path_factory.mktemp("report"), five_seeds)
    write_runs(loaded, {"none": 4.0, "constant": 4.1, "step": 4.1})
    path = loaded.study.folder / "step-seed1" / "results.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"solved_at": 300}))
    return write_report(loaded).parent


PICTURES = {
    f"{name}.png"
    for name in ("loss", "effects", "depths", "tradeoff", "lambda", "balance", "solved")
}


def test_pictures_are_drawn_for_the_data_that_there_are(folder):
    assert set(re.findall(r"\]\((\w+\.png)\)", (folder / "report.md").read_text())) == PICTURES
    assert {path.name for path in folder.glob("*.png")} == PICTURES


NAMES = ("chromium", "chromium-headless-shell", "chromium-browser", "google-chrome")
BROWSER = next((name for name in NAMES if shutil.which(name)), None)
LOOK = """<script>
addEventListener('load', () => {
  const box = element => element.getBoundingClientRect();
  document.body.dataset.found = JSON.stringify({
    images: [...document.images].map(image => image.complete && image.naturalWidth > 300 && box(image).width > 300),
    tables: [...document.querySelectorAll('table')].map(table => box(table).width > 300 && box(table).height > 50),
    wide: document.documentElement.scrollWidth > innerWidth,
    outside: performance.getEntriesByType('resource').filter(r => !r.name.startsWith('data:')).length,
  });
});
</script>"""


@pytest.mark.skipif(
    BROWSER is None, reason="no Chromium installed (the package chromium of the distribution)"
)
def test_the_page_is_whole_in_a_real_browser(folder, tmp_path):
    page = (folder / "report.html").read_text()
    looked = tmp_path / "looked.html"
    looked.write_text(page.replace("</body>", LOOK + "</body>"))
    command = [
        str(BROWSER),
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--enable-logging=stderr",
        "--dump-dom",
    ]
    done = subprocess.run(
        [*command, f"file://{looked}"], capture_output=True, text=True, timeout=120
    )
    assert "CONSOLE" not in done.stderr
    found = json.loads(re.search(r'data-found="([^"]*)"', done.stdout)[1].replace("&quot;", '"'))
    assert (
        found["images"] == [True] * len(PICTURES)
        and len(found["tables"]) >= 3
        and all(found["tables"])
    )
    assert not found["wide"] and found["outside"] == 0


def test_the_page_needs_no_network(folder):
    page = (folder / "report.html").read_text()
    assert not re.search(r"(src|href)=\"(?!data:)", page) and "http" not in page
