"""The head of docs/extend.md is run as it stands there."""

import re
from pathlib import Path

import torch

from dsv3_mtp.model.causal_lm import DeepseekV3MTP
from dsv3_mtp.model.size import model_size
from tests.conftest import tiny

PAGE = (Path(__file__).parents[2] / "docs/extend.md").read_text()


def test_the_pages_head_is_the_example_s(tmp_path, monkeypatch):
    section = PAGE.split("## A head\n")[1].split("\n## ")[0]
    [source] = re.findall(r"```python\n# my_head.py\n(.*?)```", section, re.S)
    (tmp_path / "my_head.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    [mode] = re.findall(r"--set mtp.mode=(\S+)", section)
    seen = []
    for name in (mode, "examples.bag_head:BagHead"):
        config = tiny({"mtp.mode": name, "mtp.num_nextn_predict_layers": 3})
        model = DeepseekV3MTP(config.model, config.mtp)
        model.init_weights(0)
        tokens = torch.arange(2 * (16 + model.lookahead)).view(2, -1) % 64
        out = model(tokens)
        seen.append((out.nll_sum.tolist(), model_size(model, 16).flops_per_token))
    assert seen[0] == seen[1]


def test_every_method_of_the_page_exists_and_every_public_method_is_on_the_page():
    from dsv3_mtp.heads.base import Head

    section = PAGE.split("## A head\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (`.*?) \|", section, re.M)
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    own = {name for name in vars(Head) if not name.startswith("_")} - {"name", "default"}
    assert named == own - {"has_experts", "has_weights"}  # are found out from the modules
