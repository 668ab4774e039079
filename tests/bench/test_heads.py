"""bench/heads.py: a row for each run, and what it cannot time is refused."""

import sys
from pathlib import Path

from dsv3_mtp.decode.generate import Settings, generate
from dsv3_mtp.model.causal_lm import DeepseekV3MTP
from dsv3_mtp.runs.model import load_model
from tests.made_runs import randomise, write_run
from tests.ranks import write_markov

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))  # as Python does for a script
import heads as tool


def bench(monkeypatch, *arguments: str) -> int:
    sizes = ["--prompts=2", "--prompt-tokens=4", "--new-tokens=6", "--rounds=1"]
    monkeypatch.setattr(sys, "argv", ["heads.py", *arguments, *sizes])
    return tool.main()


def test_each_run_has_a_row_with_its_own_tokens_per_step(
    make_tiny_config, tmp_path, monkeypatch, capsys
):
    data = write_markov(tmp_path / "markov", tokens=2000, documents=2)
    runs = []
    for mode in ("sequential", "medusa", "top"):
        keys = {"mtp.mode": mode, "mtp.num_nextn_predict_layers": 2}
        config = make_tiny_config(keys | {"data.train": data, "data.val": data})
        model = randomise(DeepseekV3MTP(config.model, config.mtp))
        runs.append(str(write_run(tmp_path / mode, config, model)))
    assert bench(monkeypatch, *runs[:2]) == 0
    *_, chain, medusa = capsys.readouterr().out.splitlines()
    cells = [cell.strip() for cell in chain.strip("| ").split("|")]
    head = load_model(runs[0]).model
    assert cells[:3] == [
        "sequential",
        "sequential, 2 drafts",
        f"{sum(p.numel() for p in head.mtp.parameters()):,}",
    ]
    assert medusa.startswith("| medusa | medusa, 2 drafts |")
    prompts = tool.Drafting(runs[0], tool.parse()).prompts
    found = [generate(head, [p], Settings(6, draft_depth=2, temperature=1.0)) for p in prompts]
    counts = [one.acceptance for one in found]
    tokens = sum(count.tokens_per_step * count.steps for count in counts)
    assert cells[4] == f"{tokens / sum(count.steps for count in counts):.2f}"
    assert bench(monkeypatch, *runs) == 2
    assert "top: " in (message := capsys.readouterr().err) and "has no drafter" in message
