"""Every preset of configs/heads/ can be trained as it stands, and says what was published."""

from pathlib import Path

import pytest

from dsv3_mtp.cli import command
from dsv3_mtp.config import load_config

PRESETS = sorted((Path(__file__).parents[2] / "configs/heads").glob("*.yaml"))


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_a_preset_is_planned_and_names_its_source_and_the_published_number(path, capsys):
    config = load_config(path)
    assert config.mtp.depths and config.run.name == path.stem
    header = path.read_text().split("\nbase:")[0]
    assert "Published" in header and ("arXiv" in header or "pull request" in header)
    assert header.startswith(f"# configs/heads/{path.name}: ")
    assert command.run("train", ["--config", str(path), "--dry-run"]) == 0
    assert "parameters, main model" in capsys.readouterr().out


def test_the_preset_of_dspark_is_its_config_in_this_project_s_units():
    mtp = load_config(next(path for path in PRESETS if path.stem == "dspark")).mtp
    assert mtp.objective == {"ce": 0.1, "tv": 2 * 0.9} and mtp.detach == "all"
    assert mtp.depth_weights.beta == pytest.approx(2.718281828 ** (-1 / 4), abs=5e-5)
