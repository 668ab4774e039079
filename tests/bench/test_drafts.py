"""bench/drafts.py: a row for each variant and batch, with the tokens per step of its own text."""

import sys
from pathlib import Path

import pytest

from dsv3_mtp.decode.generate import Acceptance, generate
from dsv3_mtp.model.causal_lm import DeepseekV3MTP
from dsv3_mtp.runs.model import load_model
from tests.made_runs import randomise, write_run
from tests.ranks import write_markov

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))  # as Python does for a script
import drafts as tool


def bench(monkeypatch, *arguments: str) -> int:
    sizes = ["--prompts=2", "--prompt-tokens=4", "--new-tokens=8", "--rounds=1", "--batches=1"]
    monkeypatch.setattr(sys, "argv", ["drafts.py", *sizes, *arguments])
    return tool.main()


@pytest.fixture
def run(make_tiny_config, tmp_path) -> str:
    data = write_markov(tmp_path / "markov", tokens=2000, documents=2)
    config = make_tiny_config({"data.train": data, "data.val": data})
    model = randomise(DeepseekV3MTP(config.model, config.mtp))
    return str(write_run(tmp_path / "run", config, model))


def test_each_variant_has_a_row_with_its_own_tokens_per_step(run, compiled, monkeypatch, capsys):
    assert bench(monkeypatch, f"--run={run}", "--batches", "1", "2", "--vocab=16") == 0
    rows = capsys.readouterr().out.splitlines()
    kinds = ["", ", int8", ", P=0.5", ", N=16"]
    names = ["plain", *(f"K={k}{kind}" for k in (1, 2) for kind in kinds)]
    assert len(rows) == 2 * len(names)
    for row, name in zip(rows, 2 * names, strict=True):
        assert f"rows  {name} " in row
        speed = float(row.split("us/token")[1].split()[0])
        per_step = float(row.split("]")[1].split()[0])
        even = float(row.split("break-even")[1])
        assert speed > 0 and even == pytest.approx(per_step / speed, rel=0.2)
    model, prompts, settings = tool.load(tool.parse())
    count = Acceptance()
    for prompt in prompts[:4]:  # of two rounds
        one = generate(model, [prompt], settings["K=1"]).acceptance
        count.steps, count.tokens = count.steps + one.steps, count.tokens + one.tokens
    assert f"  {count.tokens_per_step:.2f} tokens/step" in rows[1]


def test_a_dtype_is_that_of_the_weights_and_a_folder_that_is_no_run_is_named(
    run, monkeypatch, capsys
):
    monkeypatch.setattr(sys, "argv", ["drafts.py", f"--run={run}", "--dtype=float32"])
    model = tool.load(tool.parse())[0]
    assert str(model.lm_head.weight.dtype) == "torch.float32"
    assert str(load_model(run).model.lm_head.weight.dtype) == "torch.bfloat16"
    assert bench(monkeypatch, "--run=gone") == 2
    assert "gone" in capsys.readouterr().err
