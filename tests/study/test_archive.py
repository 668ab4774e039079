"""An archive is checked when it is read, and a report is made from it alone."""

import json
from pathlib import Path

import pytest

from dsv3_mtp.study.archive import read_archive, read_results, write_archive
from dsv3_mtp.study.expand import expand
from dsv3_mtp.study.load import load_study
from dsv3_mtp.study.plan import freeze, load_archive, read_plan
from dsv3_mtp.study.report import write_report
from tests.ranks import run_tool
from tests.study.toy import load_toy, record_of, write_toy

ROOT = Path(__file__).resolve().parents[2]
COMMITTED = sorted((ROOT / "docs" / "studies").glob("*/report.md"))
# Reports of before there were archives: their runs are gone. This list only ever gets shorter.
WITHOUT_ARCHIVE = {"depth", "fp8", "induction"}
WITHOUT_ARCHIVE |= {"lambda_task", "star", "suffix"}


@pytest.fixture
def made(tmp_path):
    """A study and the records of its runs."""
    loaded = load_toy(tmp_path)
    return loaded, [record_of(loaded, run, {"val/main_loss": 4.0}) for run in expand(loaded, {})]


def test_a_record_comes_back_as_it_was_written(made, tmp_path):
    _, records = made
    write_archive(tmp_path, records)
    assert read_archive(tmp_path) == records
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == len(records)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda line: line[:40], "not JSON"),
        (lambda line: line.replace('"seed": 1', '"seed": "one"'), "seed must be an integer"),
        (lambda line: line.replace('"tokens": 512', '"tokenz": 512'), "tokens missing"),
        (lambda line: line.replace('"format": 1', '"format": 2'), "format must be 1"),
        (lambda line: line.replace("[100, 200,", "[200,"), "must be as many as tokens"),
    ],
)
def test_a_damaged_line_is_one_sentence_with_file_and_line(made, tmp_path, damage, words):
    _, records = made
    write_archive(tmp_path, records)
    path = tmp_path / "results.jsonl"
    first, second, *rest = path.read_text().splitlines()
    changed = damage(second.replace('"seed": 2', '"seed": 1'))
    assert changed != second
    path.write_text("\n".join([first, changed, *rest]))
    with pytest.raises(ValueError, match=words) as error:
        read_archive(tmp_path)
    text = str(error.value)
    assert text.startswith(f"{path}, line 2: damaged") and "\n" not in text


def test_a_run_that_is_there_twice_is_refused(made, tmp_path):
    _, records = made
    write_archive(tmp_path, [*records, records[0]])
    with pytest.raises(ValueError, match="line 7: constant-seed1 is there twice"):
        read_archive(tmp_path)


def test_a_results_file_of_a_run_is_checked_too(tmp_path):
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(ValueError, match=r"results\.json: damaged .* delete this file"):
        read_results(tmp_path)


def test_the_tool_says_2_for_a_damaged_archive(made, tmp_path):
    loaded, records = made
    folder = tmp_path / "archive"
    folder.mkdir()
    write_archive(folder, records)
    loaded.study.folder.mkdir(parents=True)
    freeze(loaded, 0)
    plan = (loaded.study.folder / "plan.json").read_text()
    (folder / "plan.json").write_text(plan.replace('"question": "Does', '"question": "Did', 1))
    log = tmp_path / "log"
    code, output = run_tool(ROOT / "tools" / "study.py", "--from", str(folder), log=log)
    assert code == 2 and "Traceback" not in output
    assert "plan.json: `frozen` has been edited after the first start" in output


# --- the plan -------------------------------------------------------------------------------------


def test_the_plan_is_frozen_at_the_first_start_and_changes_are_kept_with_the_runs_then(tmp_path):
    loaded = load_toy(tmp_path)
    loaded.study.folder.mkdir(parents=True)
    first = freeze(loaded, 0)
    assert first.changes == [] and freeze(loaded, 3).changes == []

    def edit(tree):
        tree["expectation"] = "It does not."
        tree["primary"]["margin"] = 0.5
        tree["seeds"] = [1, 2, 9]
        tree["arms"]["none"]["set"]["optim.lr"] = 0.5

    changed = freeze(load_study(write_toy(tmp_path, edit)), 4)
    assert changed.hash == first.hash and changed.frozen == first.frozen
    found = {c.key: (c.before, c.now, c.finished) for c in changed.changes}
    assert found["expectation"] == ("It does.", "It does not.", 4)
    assert found["primary.margin"] == (0.01, 0.5, 4)
    assert found["seeds"] == ([1, 2], [1, 2, 9], 4)
    assert found["configs.none.optim.lr"][1:] == (0.5, 4)
    assert changed.late_seeds() == [9]
    assert len(freeze(load_study(tmp_path / "study.yaml"), 6).changes) == len(changed.changes)


def test_the_report_prints_what_was_changed_and_names_late_seeds(tmp_path, monkeypatch):
    monkeypatch.setattr("dsv3_mtp.study.report.draw_all", lambda data, folder: [("a.png", "")])
    monkeypatch.setattr("dsv3_mtp.study.hover.live", lambda data: None)
    monkeypatch.setattr("dsv3_mtp.study.page.to_html", lambda *_, **__: "")
    loaded = load_toy(tmp_path)
    loaded.study.folder.mkdir(parents=True)
    freeze(loaded, 0)
    late = load_study(tmp_path / "study.yaml", ["seeds=[1, 2, 9]", "primary.margin=0.5"])
    records = [record_of(late, run, {"val/main_loss": 4.0}) for run in expand(late, {})]
    text = write_report(late, freeze(late, 6), records, tmp_path).read_text()
    assert "Seeds added after the first start: 9." in text
    assert "| primary.margin | 0.01 | 0.5 | 6 |" in text and "Expected then: It does." in text
    assert "Changed when 6 or more runs had finished: primary.margin" in text


def test_an_archive_takes_other_seeds_and_no_other_settings(tmp_path):
    loaded = load_toy(tmp_path)
    loaded.study.folder.mkdir(parents=True)
    freeze(loaded, 0)
    found = load_archive(loaded.study.folder, ("seeds=[1, 2, 3]", "run.name=more"))
    assert found.study.seeds == (1, 2, 3) and found.study.folder.name == "more"
    assert found.configs["step"].mtp == loaded.configs["step"].mtp
    with pytest.raises(ValueError, match=r"--set optim\.lr=1: with --from only"):
        load_archive(loaded.study.folder, ("optim.lr=1",))


# --- the committed reports ------------------------------------------------------------------------


@pytest.mark.parametrize("report", COMMITTED, ids=lambda path: path.parent.name)
def test_each_committed_report_equals_its_archive(report, tmp_path, monkeypatch):
    folder = report.parent
    if folder.name in WITHOUT_ARCHIVE:
        assert not (folder / "results.jsonl").exists(), "take its name off the list"
        return
    monkeypatch.setattr("dsv3_mtp.study.hover.live", lambda data: None)
    monkeypatch.setattr("dsv3_mtp.study.page.to_html", lambda *_, **__: "")
    write_report(load_archive(folder), read_plan(folder), read_archive(folder), tmp_path)
    for name in ("report.md", "results.jsonl", "plan.json"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes(), name
    pictures = {path.name for path in tmp_path.glob("*.png")}
    assert pictures == {path.name for path in folder.glob("*.png")}
    assert json.loads((folder / "plan.json").read_text())["format"] == 1
