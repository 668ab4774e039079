"""Ordinary finished runs side by side."""

import json

import pytest

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
    header, row = text.splitlines()[:2]
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
