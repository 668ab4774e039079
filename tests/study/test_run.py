"""Studies are run by real processes: forks are bitwise, nothing is repeated, failures are named."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch

from dsv3_mtp.files.run_folder import newest_checkpoint
from dsv3_mtp.report.metrics import MetricsLog, read_metrics
from dsv3_mtp.study.archive import Fork, read_results, write_results
from dsv3_mtp.study.expand import Run, expand
from dsv3_mtp.study.folder import (
    adopt,
    budgets_of,
    check_folders,
    load_archived,
    records_of,
    report_study,
)
from dsv3_mtp.study.load import load_study
from dsv3_mtp.study.plan import read_plan
from dsv3_mtp.study.run import _reached, devices_of, run_study
from dsv3_mtp.study.training import Trained
from dsv3_mtp.study.worker import claim, fork, train_and_measure
from tests.made_runs import read_newest
from tests.ranks import run_tool, timeless, touch
from tests.study.toy import STEPS, load_toy, record_of, write_toy

pytestmark = pytest.mark.dist
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True, scope="module")
def no_pictures():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dsv3_mtp.report.plots.plot_run", touch)
        patch.setattr("dsv3_mtp.study.report.draw_all", lambda data, folder: [("a.png", "")])
        patch.setattr("dsv3_mtp.study.page.to_html", lambda *_, **__: "")
        patch.setattr("dsv3_mtp.study.hover.live", lambda data: None)
        yield


def study_file(loaded) -> Path:
    return Path(loaded.study.run.dir).parent / "study.yaml"


def everything(run) -> bool:
    return True


def records(folder: Path) -> list[dict]:
    return timeless(read_metrics(folder / "metrics.jsonl"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(study, what was said, names of failed runs): the toy, with an arm that diverges and one that
    cannot start.
    """

    def add(tree):
        tree["arms"]["wild"] = {"about": "far too fast", "set": {"optim.lr": 1e18}}
        tree["arms"]["absent"] = {"about": "no weights", "set": {"train.init_from": "nowhere"}}
        match = {"arm": "constant", "by": "cpu_time", "pace": "none"}
        tree["arms"]["timed"] = {
            "about": "as long as constant",
            "set": {"mtp.mode": "none"},
            "match": match,
        }
        tree["comparisons"]["speed"] = {
            "against": "none",
            "arms": ["wild", "timed"],
            "rule": "same model",
        }

    loaded = load_toy(tmp_path_factory.mktemp("toy"), add)
    said: list[str] = []
    failed = run_study(loaded, only=everything, jobs=2, say=said.append)
    return loaded, said, failed


def test_each_run_is_an_ordinary_run_folder_with_results(finished):
    loaded, _, _ = finished
    for name in ("constant-seed1", "step-seed2", "none-seed1"):
        folder = loaded.study.folder / name
        assert {
            "config.yaml",
            "manifest.json",
            "metrics.jsonl",
            "curves.png",
            "checkpoints",
        } <= set(os.listdir(folder))
        results = read_results(folder)
        assert results.finished and results.seconds_per_token > 0
        assert results.metrics["val/main_loss"] == records(folder)[-1]["val/main_loss"]
    drafts = read_results(loaded.study.folder / "constant-seed1").metrics
    assert (
        1 <= drafts["acceptance/T0/tokens_per_step"] <= 2
        and 0 <= drafts["acceptance/T1/joint/1"] <= 1
        and drafts["acceptance/T1/plain_over_drafting"] > 0
    )
    assert (
        "acceptance/T0/tokens_per_step"
        not in read_results(loaded.study.folder / "none-seed1").metrics
    )


def test_a_forked_run_equals_the_same_run_from_the_start_bitwise(finished, tmp_path):
    loaded, _, _ = finished
    forked = loaded.study.folder / "step-seed1"
    assert "forked from" in (forked / "log.txt").read_text()
    assert read_results(forked).forked_from == Fork(run="constant-seed1", step=4)

    def alone(tree):
        tree["arms"] = {"step": tree["arms"]["step"], "none": tree["arms"]["none"]}
        tree["comparisons"] = {
            "heads": {"against": "none", "arms": ["step"], "rule": "added parameters"}
        }

    whole = load_toy(tmp_path, alone)
    run_study(whole, only=lambda run: run.name == "step-seed1", jobs=1, say=lambda text: None)
    folder = whole.study.folder / "step-seed1"
    assert read_results(folder).forked_from is None
    assert records(folder) == records(forked)
    for run in (folder, forked):
        newest = newest_checkpoint(run / "checkpoints")
        assert newest is not None and newest.name == f"global_step{STEPS}"
    expected, got = read_newest(folder), read_newest(forked)
    assert expected.keys() == got.keys() and all(
        torch.equal(value, got[key]) for key, value in expected.items()
    )
    ours, theirs = (read_results(run).metrics for run in (folder, forked))
    for metrics in (ours, theirs):
        metrics.pop("acceptance/T1/plain_over_drafting")  # a time
    assert ours == theirs


def test_a_parents_checkpoints_are_deleted_once_its_children_are_done(finished):
    loaded, _, _ = finished
    names = [
        path.name
        for path in (loaded.study.folder / "constant-seed1" / "checkpoints").glob("global_step*")
    ]
    assert names == [f"global_step{STEPS}"]


def test_diverged_and_failed_runs_are_told_apart_and_named(finished):
    loaded, said, failed = finished
    assert sorted(failed) == ["absent-seed1", "absent-seed2"]
    results = read_results(loaded.study.folder / "wild-seed1")
    assert results.status == "diverged" and "nan" in results.error
    assert any("wild-seed1: diverged" in line for line in said)
    report = report_study(loaded).read_text()
    assert "- wild seed 1 diverged" in report and "- absent: no result with seed 1, 2" in report


def test_the_arm_with_anothers_time_gets_its_tokens_from_the_measurement(finished):
    loaded, _, _ = finished
    tokens = budgets_of(loaded)["timed"]

    def seconds(arm):
        found = [read_results(loaded.study.folder / f"{arm}-seed{seed}") for seed in (1, 2)]
        return sum(r.seconds_per_token for r in found) / 2

    step = 4 * 16
    assert tokens % step == 0
    assert tokens == pytest.approx(
        STEPS * step * seconds("constant") / seconds("none"), abs=step / 2
    )
    assert read_results(loaded.study.folder / "timed-seed1").tokens == tokens


def test_a_seed_that_diverged_does_not_hold_up_the_arm_with_anothers_time(tmp_path):
    def add(tree):
        match = {"arm": "constant", "by": "cpu_time", "pace": "none"}
        tree["arms"]["timed"] = {"about": "as long", "set": {"mtp.mode": "none"}, "match": match}

    loaded = load_toy(tmp_path, add)

    def close(arm, seed, **more):
        record = record_of(loaded, Run(arm, seed, loaded.configs[arm]), {}, **more)
        (loaded.study.folder / record.name).mkdir(parents=True)
        write_results(loaded.study.folder / record.name, record)

    for seed in (1, 2):
        close("none", seed, seconds_per_token=1.0)
    close("constant", 1, seconds_per_token=2.0)
    assert budgets_of(loaded) == {}
    close("constant", 2, status="diverged", seconds_per_token=None)
    assert budgets_of(loaded) == {"timed": 1024}
    close("timed", 1, config={**loaded.configs["none"].to_dict(), "train": {"total_tokens": 640}})
    assert budgets_of(loaded) == {"timed": 640}  # a run has begun with it: that is fixed


def test_the_time_of_a_run_is_that_of_all_its_starts(tmp_path, monkeypatch):
    """Interrupted, then killed while it was measured: the last start trains nothing, and takes a
    second.
    """
    loaded = load_toy(tmp_path)
    run = next(run for run in expand(loaded, {}) if run.arm == "none")
    folder = loaded.study.folder / run.name
    folder.mkdir(parents=True)
    # tokens before and after, seconds
    starts = iter([(0, 192, 6.0), (192, 512, 10.0), (512, 512, 1.0)])

    def start(config, command):
        first, after, cost = next(starts)
        return Trained(
            seconds=cost, tokens=after - first, pace=0.0, finished=after == 512, error=None
        )

    bare = record_of(loaded, run, {"val/main_loss": 4.0})
    module = "dsv3_mtp.study.worker"
    monkeypatch.setattr(f"{module}.train", start)
    monkeypatch.setattr(f"{module}.measure", lambda *_, **more: bare.model_copy(update=more))
    assert train_and_measure(loaded.study, run, [], held=0) == 3
    assert train_and_measure(loaded.study, run, [], held=0) == 0
    (folder / "results.json").unlink()
    assert train_and_measure(loaded.study, run, [], held=0) == 0
    assert read_results(folder).seconds_per_token == 16.0 / 512


def test_a_forked_run_of_another_length_has_its_own_progress(tmp_path):
    """Else the parent's last quarter, say, would count as the child's."""
    parent, child = tmp_path / "parent", tmp_path / "child"
    (parent / "checkpoints" / "global_step2").mkdir(parents=True)
    (parent / "checkpoints" / "global_step2" / "COMPLETE.json").write_text('{"files": {}}')
    child.mkdir()
    for step in (1, 2, 3):
        record = {"step": step, "tokens": 10 * step, "progress": step / 4}
        MetricsLog(parent / "metrics.jsonl").append(record)
    fork(parent, child, 2, total_tokens=80)
    assert [(r["step"], r["progress"]) for r in read_metrics(child / "metrics.jsonl")] == [
        (1, 0.125),
        (2, 0.25),
    ]


def test_a_finished_study_is_not_run_again(finished):
    loaded, _, _ = finished
    before = {path: path.stat().st_mtime_ns for path in loaded.study.folder.glob("*/results.json")}
    said: list[str] = []
    run_study(loaded, only=lambda run: run.arm != "absent", jobs=2, say=said.append)
    assert said == []
    assert {
        path: path.stat().st_mtime_ns for path in loaded.study.folder.glob("*/results.json")
    } == before


def test_choosing_no_run_is_an_error_that_names_the_arms(finished):
    loaded, _, _ = finished
    with pytest.raises(
        ValueError, match=r"--only: none of the runs .* constant, step, none, wild, absent, timed"
    ):
        run_study(loaded, only=lambda run: False, jobs=1)


def test_run_folders_of_other_settings_are_refused(finished):
    loaded, _, _ = finished
    # the second: other windows
    other = load_study(study_file(loaded), ["optim.grad_clip=0.5", "eval.batches=3"])
    with pytest.raises(ValueError, match="other settings") as error:
        check_folders(other.study, expand(other, {}))
    assert "optim.grad_clip is 1.0, the study says 0.5" in str(error.value)
    assert "the study says 3" in str(error.value)


def test_a_killed_study_goes_on_where_it_stopped(tmp_path):
    def only_constant(tree):
        tree["arms"] = {"none": tree["arms"]["none"], "constant": tree["arms"]["constant"]}
        tree["comparisons"].pop("schedule")
        tree["seeds"] = [1]

    path = write_toy(tmp_path, only_constant)
    folder = tmp_path / "runs" / "toy"
    child = os.fork()
    if child == 0:
        os.setsid()
        try:
            run_study(load_study(path), only=everything, jobs=1)
        finally:
            os._exit(1)
    metrics = folder / "constant-seed1" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while (
        not (metrics.exists() and metrics.read_text().count("\n") >= 3)
        and time.monotonic() < deadline
    ):
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    first = (folder / "none-seed1" / "results.json").stat().st_mtime_ns
    deadline = time.monotonic() + 60
    while read_results(folder / "constant-seed1") is None:  # its old process notices, and ends
        assert run_study(load_study(path), only=everything, jobs=1, say=lambda text: None) == []
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert read_results(folder / "constant-seed1").finished
    assert (folder / "none-seed1" / "results.json").stat().st_mtime_ns == first
    assert [r["step"] for r in records(folder / "constant-seed1") if "train/loss" in r] == list(
        range(1, STEPS + 1)
    )


def test_two_programs_share_a_study_and_repeat_nothing(tmp_path):
    def small(tree):
        tree["arms"].pop("step")
        tree["comparisons"].pop("schedule")

    path = write_toy(tmp_path, small)
    folder, children = tmp_path / "runs" / "toy", []
    for number in range(2):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                with (tmp_path / f"said{number}").open("w", buffering=1) as file:
                    say = lambda text: print(text, file=file)  # noqa: E731
                    code = len(run_study(load_study(path), only=everything, jobs=1, say=say))
            finally:
                os._exit(code)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    runs = {f"{arm}-seed{seed}" for arm in ("constant", "none") for seed in (1, 2)}
    said = [(tmp_path / f"said{number}").read_text() for number in range(2)]
    lines = [line for text in said for line in text.splitlines() if line.startswith("[")]
    assert len(lines) == len(runs)  # by either: on a busy machine one may have done them all
    for name in runs:
        assert read_results(folder / name).finished
        assert len(json.loads((folder / name / "manifest.json").read_text())["starts"]) == 1
    assert read_plan(folder).changes == []


@pytest.mark.slow
def test_a_run_of_two_ranks_equals_that_of_one(tmp_path):
    """Sequence parallel on two processes under a launcher of its own: losses differ by rounding."""

    def two(tree):
        tree["seeds"] = [1]
        tree["scales"]["cpu"]["ranks"] = 2
        tree["set"] = {"parallel.sequence_parallel_size": 2}

    alone = load_toy(tmp_path / "one", lambda tree: tree.update(seeds=[1]))
    pair = load_toy(tmp_path / "two", two)
    only = lambda run: run.arm == "constant"  # noqa: E731
    for loaded in (alone, pair):
        assert run_study(loaded, only=only, jobs=1, say=lambda text: None) == []
    one, both = (read_results(x.study.folder / "constant-seed1") for x in (alone, pair))
    assert both.metrics["val/main_loss"] == pytest.approx(one.metrics["val/main_loss"], abs=1e-4)
    starts = json.loads((pair.study.folder / "constant-seed1/manifest.json").read_text())["starts"]
    assert [start["world_size"] for start in starts] == [2] and both.seconds_per_token > 0


def test_a_run_that_another_program_works_on_is_left_to_it(tmp_path):
    loaded, said = load_toy(tmp_path), []
    name = "none-seed1"
    held = claim(loaded.study.folder / name)
    only = lambda run: run.name == name  # noqa: E731
    assert run_study(loaded, only=only, jobs=1, say=said.append) == []
    os.close(held)
    assert said == [f"left to other programs that work on them: {name}"]
    assert read_results(loaded.study.folder / name) is None


def test_an_archive_goes_on_without_repeating_a_run(finished, tmp_path):
    """The run that its archive lacks is run alone, and comes to the same."""
    loaded, _, _ = finished
    report_study(loaded, tmp_path)
    lines = (tmp_path / "results.jsonl").read_text().splitlines()
    assert len(lines) == len(records_of(loaded))
    missing = [n for n, line in enumerate(lines) if '"arm": "none", "seed": 2' in line]
    (tmp_path / "results.jsonl").write_text(
        "\n".join(lines[: missing[0]] + lines[missing[0] + 1 :])
    )
    again = load_archived(tmp_path, (f"run.dir={tmp_path}", "run.name=again"))
    said: list[str] = []
    run_study(again, only=lambda run: run.arm != "absent", jobs=1, say=said.append)
    assert len(said) == 1 and said[0].startswith("[1/1] none-seed2")
    old, new = (read_results(f / "none-seed2") for f in (loaded.study.folder, again.study.folder))
    assert new.metrics == old.metrics and new.curves == old.curves
    assert not (again.study.folder / "constant-seed1" / "checkpoints").exists()


def test_a_finished_run_of_equal_settings_is_adopted(finished, tmp_path):
    loaded, _, _ = finished
    source = loaded.study.folder / "none-seed2"
    other = load_study(study_file(loaded), [f"run.dir={tmp_path}"])
    said: list[str] = []
    adopt(other, [source], say=said.append)
    record, original = read_results(other.study.folder / "none-seed2"), read_results(source)
    assert record.adopted_from == str(source) and record.metrics == original.metrics
    assert said == [f"none-seed2: adopted from {source}"]
    third = load_study(study_file(loaded), [f"run.dir={tmp_path / 'third'}", "optim.lr=0.5"])
    with pytest.raises(
        ValueError, match=r"no run of this study has its settings; none-seed2 .*optim.lr is"
    ):
        adopt(third, [source])


def test_every_worker_has_a_device_of_its_own():
    assert [devices_of(slot, 1, None, 2) for slot in range(4)] == ["0", "1", "0", "1"]
    assert [devices_of(slot, 1, "5,GPU-a", 2) for slot in range(2)] == ["5", "GPU-a"]
    assert [devices_of(slot, 2, None, 5) for slot in range(3)] == ["0,1", "2,3", "4,0"]
    assert devices_of(3, 1, None, 0) is None


def test_the_tool_reports_a_wrong_file_without_a_traceback(tmp_path):
    path = write_toy(tmp_path, lambda tree: tree.update(seeds=[]))
    code, output = run_tool(
        ROOT / "tools" / "study.py", "--study", str(path), "--dry-run", log=tmp_path / "log"
    )
    assert code == 2 and "Traceback" not in output and "seeds" in output and str(path) in output


def test_missing_data_is_said_once_before_any_run_starts(tmp_path):
    path = write_toy(tmp_path, lambda tree: tree.update(set={"data.val": "nowhere"}))
    log = tmp_path / "log"
    code, output = run_tool(ROOT / "tools" / "study.py", "--study", str(path), log=log)
    assert code == 2 and output.count("nowhere: neither a prepared folder") == 1, output
    assert not list((tmp_path / "runs" / "toy").glob("*-seed*"))


def test_arms_that_fail_alike_stop_the_study_with_code_1(tmp_path):
    change = {"seeds": [1], "set": {"train.init_from": "nowhere"}}
    path = write_toy(tmp_path, lambda tree: tree.update(change))
    arguments = ("--study", str(path), "--jobs", "1")
    code, output = run_tool(ROOT / "tools" / "study.py", *arguments, log=tmp_path / "log")
    assert code == 1 and "constant-seed1: FAILED" in output and "nothing to report" in output
    assert output.count("FAILED") == 2 and "fail alike, so the study stops: ValueError" in output


def test_active_runs_are_reported_with_progress_and_log(tmp_path, monkeypatch):
    monkeypatch.setattr("dsv3_mtp.study.run.PROGRESS_S", 0.0)
    monkeypatch.setattr("dsv3_mtp.study.run.POLL_S", 0.05)
    loaded, said = load_toy(tmp_path), []
    run_study(loaded, only=lambda run: run.name == "none-seed1", jobs=1, say=said.append)
    lines = [line for line in said if line.startswith("  none-seed1: ")]
    assert lines and all(
        line.endswith(str(loaded.study.folder / "none-seed1/log.txt")) for line in lines
    )
    folder = tmp_path / "made"
    assert _reached(folder) == "starting"
    record = {"step": 1, "progress": 0.25, "time_s": 100.0, "train/main_loss": 3.0}
    MetricsLog(folder / "metrics.jsonl").append(record | {"perf/tokens_per_s": 1.0})
    assert _reached(folder) == "25%, loss 3.000, eta 0:05:00"
