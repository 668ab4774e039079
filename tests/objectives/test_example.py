"""The worked example of docs/extend.md, "An objective"."""

import re
from pathlib import Path

import pytest
import torch

from dsv3_mtp.model.causal_lm import DeepseekV3MTP
from dsv3_mtp.report.metrics import read_metrics
from tests.conftest import tiny
from tests.ranks import run_ranks, train_to_end, write_markov

ROOT = Path(__file__).parents[2]
NAME = "examples.reverse_kl:ReverseKL"


def test_the_page_shows_the_file():
    section = (ROOT / "docs/extend.md").read_text().partition("## An objective\n")[2]
    shown = re.search(r"```python\n(.*?)```", section, re.DOTALL)
    source = (ROOT / "examples/reverse_kl.py").read_text()
    assert shown is not None and source.endswith(shown[1])
    assert NAME in section.partition("\n## ")[0]


def test_it_is_its_formula():
    config = tiny({"mtp.objective": {NAME: 1.0}})
    model = DeepseekV3MTP(config.model, config.mtp).double()
    model.init_weights(0)
    tokens = torch.randint(64, (2, 18))
    out, logits = model(tokens), model.logits(tokens)
    q, p = logits[1, :, :-1].softmax(-1), logits[0, :, 1:].softmax(-1)
    want = (q * (q / p).log()).sum(-1).mean().item()
    assert (out.term_sum / out.term_count).item() == pytest.approx(want, rel=1e-10)


@pytest.mark.dist
def test_it_trains_beside_the_label(tmp_path):
    data = write_markov(tmp_path / "markov", tokens=2000, documents=20)
    keys = {"run.name": "run", "run.dir": str(tmp_path), "data.train": data, "data.val": data}
    keys |= {"mtp.objective": {"ce": 0.5, NAME: 1.0}, "train.total_tokens": 4 * 4 * 16}
    log = tmp_path / "log"
    assert run_ranks(train_to_end, tiny(keys), log=log) == [0], Path(f"{log}.rank0").read_text()
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert all("train/reverse_kl/1" in r or "val/reverse_kl/1" in r for r in records)
