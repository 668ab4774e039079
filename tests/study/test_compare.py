"""Ordinary finished runs side by side."""

import json

import pytest
import yaml

from dsv3_mtp.report.metrics import MetricsLog
from dsv3_mtp.study.compare import compare
from dsv3_mtp.study.expand import expand
from tests.study.toy import START, load_toy


@pytest.fixture
def runs(tmp_path):
    """Run folders of two arms with two seeds each, as training leaves them."""
    loaded = load_toy(tmp_path)
    for run in expand(loaded, {}):
        folder = loaded.study.folder / run.name
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(run.config.to_yaml())
        start = {"time": "t", "git": "abc", "git_dirty": False, "python": "3", "device": "cpu"}
        start |= {"threads": 1, "versions": START.versions, "data": {}}
        (folder / "manifest.json").write_text(json.dumps({"starts": [start]}))
        log = MetricsLog(folder / "metrics.jsonl")
        for step in (4, 8):
            loss = 5 - 0.1 * step + 0.01 * run.seed + (run.arm == "none")
            log.append(
                {"step": step, "tokens": 64 * step, "progress": step / 8, "val/main_loss": loss}
            )
    return {run.name: loaded.study.folder / run.name for run in expand(loaded, {})}


def test_seeds_are_one_arm_and_settings_metrics_and_curves_are_set_beside_each_other(
    runs, tmp_path
):
    names = ["none-seed1", "none-seed2", "step-seed1", "step-seed2"]
    text, page = compare([runs[name] for name in names], tmp_path / "out")
    header, row = text.splitlines()[:2]  # no warning: one budget, and only one arm has heads
    assert header.split() == ["metric", "none_seed1", "step_seed1"]
    assert "5.2150 +-" in row and "4.2150 +-" in row
    written = (tmp_path / "out" / "compare.md").read_text()
    assert "| mtp.mode | none | sequential |" in written and "not for claims" in written
    assert "optim.lr" not in written and "Holm" not in written
    assert page.exists() and (tmp_path / "out" / "loss.png").exists()


def test_what_cannot_be_compared_is_refused(runs, tmp_path):
    with pytest.raises(ValueError, match="two runs or more"):
        compare([runs["none-seed1"]], tmp_path)
    with pytest.raises(ValueError, match="differ in their seeds only"):
        compare([runs["none-seed1"], runs["none-seed2"]], tmp_path)
    with pytest.raises(ValueError, match="one is enough"):
        compare([runs["none-seed1"], runs["step-seed1"], runs["step-seed1"]], tmp_path)
    (runs["step-seed1"] / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match="step-seed1: has not been validated yet"):
        compare([runs["none-seed1"], runs["step-seed1"]], tmp_path)


def change(folder, **settings):
    tree = yaml.safe_load((folder / "config.yaml").read_text())
    for key, value in settings.items():
        section, _, name = key.partition("__")
        tree[section][name] = value
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))


def test_runs_above_their_floors_other_budgets_and_other_depths_are_said_first(runs, tmp_path):
    names = ["constant-seed1", "step-seed1", "none-seed1"]
    for run, floor in zip(names, (4.2, 4.3, 6.0), strict=True):  # losses 4.21, 4.21, 5.21
        lines = (runs[run] / "metrics.jsonl").read_text().splitlines()
        last = json.loads(lines[-1]) | {"val/floor/trigram": floor, "val/floor/overlap/table/1": 1}
        (runs[run] / "metrics.jsonl").write_text("\n".join([*lines[:-1], json.dumps(last)]) + "\n")
    change(runs["step-seed1"], train__total_tokens=256, mtp__num_nextn_predict_layers=2)
    text, _ = compare([runs[name] for name in names], tmp_path / "out")
    said = text.splitlines()[:3]
    assert said[0].startswith("constant-seed1: The main model (4.210 nats per token) is not below")
    assert said[1] == ("budgets differ: constant-seed1 512, step-seed1 256, none-seed1 512 tokens")
    assert said[2] == (
        "D differs: tokens per step are not to be ranked "
        "(constant-seed1 1, step-seed1 2, none-seed1 0)"
    )
    assert text.splitlines()[3].startswith("metric")
    (floors,) = [line for line in text.splitlines() if line.startswith("val/floor/")]
    assert floors.split()[:4:3] == ["val/floor/trigram", "4.3000"]
    page = (tmp_path / "out" / "compare.md").read_text()
    assert all(line in page for line in said)
    assert page.index(said[2]) < page.index("| setting |")
