"""docs/schedules.md shows every registered schedule: an override that loads, and its picture.

`python tests/report/test_schedules_page.py` draws the pictures anew.
"""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest

from dsv3_mtp.config import load_config
from dsv3_mtp.config.loss_weights import LOSS_WEIGHTS

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "schedules.md").read_text()
CHAPTERS = dict(part.split("\n", 1) for part in PAGE.split("\n## ")[1:])


def config_of(kind: str):
    """v3_tiny with the override that the page gives for a type."""
    override = re.search(r"^    (--set .*)$", CHAPTERS[kind], flags=re.M)
    return load_config(ROOT / "configs" / "v3_tiny.yaml", shlex.split(override[1])[1::2])


@pytest.mark.parametrize("kind", LOSS_WEIGHTS)
def test_the_page_has_an_example_and_a_picture_of_the_type(kind, tmp_path):
    from dsv3_mtp.report.plots import plot_loss_weights

    assert config_of(kind).mtp.loss_weight.type == kind
    assert f"| `{kind}` |" in PAGE
    assert f"](schedules/{kind}.png)" in CHAPTERS[kind]
    plot_loss_weights(config_of(kind), tmp_path / "x.png")
    from PIL import Image

    drawn, shown = (
        np.asarray(Image.open(p).convert("L"), np.float32)
        for p in (tmp_path / "x.png", ROOT / f"docs/schedules/{kind}.png")
    )
    assert drawn.shape == shown.shape == (260, 600)
    assert np.abs(drawn - shown).mean() < 0.5  # of 255: fonts may differ a little


@pytest.mark.parametrize("text", re.findall(r"^    (--set '.*)$", PAGE, flags=re.M))
def test_every_override_of_the_page_loads(text, monkeypatch):
    monkeypatch.chdir(ROOT)
    load_config(ROOT / "configs" / "v3_tiny.yaml", shlex.split(text)[1::2])


if __name__ == "__main__":
    from dsv3_mtp.report.plots import plot_loss_weights

    for name in LOSS_WEIGHTS:
        plot_loss_weights(config_of(name), ROOT / "docs" / "schedules" / f"{name}.png")
