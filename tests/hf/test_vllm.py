"""Our export, served by vLLM: log-probabilities, greedy tokens, and which drafts stand.

VLLM_PYTHON names the python of an environment with vLLM's CPU build (docs/huggingface.md). The
model is small and half trained, so that some drafts stand and others fall. vLLM zeroes the
embedding that a module reads at slot 0, that of t_1; here that token's embedding is zero already,
which leaves nothing to differ.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dsv3_mtp.decode.generate import Settings, stream
from dsv3_mtp.hf import export_hf
from dsv3_mtp.model.causal_lm import DeepseekV3MTP
from tests.conftest import tiny
from tests.decode.plain import CYCLE, train_on_cycle
from tests.made_runs import randomise, write_run

PYTHON = os.environ.get("VLLM_PYTHON", "")
pytestmark = [
    pytest.mark.serve,
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="VLLM_PYTHON names no python that has vLLM"),
]
SIZES = {  # its attention on CPUs takes heads whose width is a multiple of 16
    "model.qk_nope_head_dim": 32,
    "model.qk_rope_head_dim": 16,
    "model.v_head_dim": 32,
    "model.max_position_embeddings": 128,
    "train.dtype": "float32",
}
SILENT = 1  # t_1 of every prompt
PROMPTS = [
    [CYCLE[start], SILENT, *(CYCLE * 3)[start + 1 : start + 1 + more]]
    for start, more in ((0, 4), (3, 0), (5, 20), (7, 31), (2, 9))
]
NEW_TOKENS = 40
TOLERANCE = 1e-5  # of log-probabilities down to -15 in float32, over four layers


@pytest.fixture(scope="module", params=[1, 2], ids=["D=1", "D=2"])
def served(request, tmp_path_factory) -> tuple[DeepseekV3MTP, Path]:
    """A model of D modules and its export."""
    folder = tmp_path_factory.mktemp("served")
    depths = {"mtp.num_nextn_predict_layers": request.param}
    config = tiny(SIZES | depths | {"run.name": "run", "run.dir": str(folder)})
    model = randomise(DeepseekV3MTP(config.model, config.mtp))
    train_on_cycle(model, 15)
    model.requires_grad_(False).eval()
    model.model.embed_tokens.weight[SILENT] = 0
    export_hf(write_run(folder / "run", config, model), folder / "hf", dtype="fp32")
    return model, folder / "hf"


def ask(folder: Path, drafts: int) -> dict:
    request = {
        "folder": str(folder),
        "prompts": PROMPTS,
        "new_tokens": NEW_TOKENS,
        "drafts": drafts,
    }
    kept = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [PYTHON, str(Path(__file__).with_name("vllm_engine.py"))],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        env=kept,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def ours(model: DeepseekV3MTP, drafts: int) -> dict:
    """Greedy tokens, and the counts as vLLM makes them: a step tests all its drafts, also those
    beyond the last token that is wanted.
    """
    found: dict = {"tokens": [], "steps": 0, "accepted": [0] * drafts}
    for prompt in PROMPTS:
        tokens: list[int] = []
        settings = Settings(NEW_TOKENS + drafts + 1, draft_depth=drafts)
        for step in stream(model, [prompt], settings):
            if tokens and len(tokens) < NEW_TOKENS:
                found["steps"] += 1
                found["accepted"] = [
                    n + (step.accepted > k) for k, n in enumerate(found["accepted"])
                ]
            tokens += step.tokens
        found["tokens"].append(tokens[:NEW_TOKENS])
    return found


def report(theirs: dict, mine: dict) -> None:
    for name, counts in (("vLLM", theirs), ("here", mine)):
        print(f"{name}: {counts['steps']} steps, accepted {counts['accepted']}", file=sys.stderr)


def test_log_probabilities_and_greedy_tokens_are_ours(served):
    model, folder = served
    theirs = ask(folder, drafts=0)
    assert theirs["tokens"] == ours(model, 0)["tokens"]
    worst = 0.0
    for prompt, said in zip(PROMPTS, theirs["logprobs"], strict=True):
        with torch.no_grad():
            logits = model.logits(torch.tensor([[*prompt, *[0] * model.lookahead]]))[0, 0]
        mine = logits[: len(prompt) - 1].log_softmax(-1)
        worst = max(worst, (mine - torch.tensor(said)).abs().max().item())
    print(f"log-probabilities: {worst:.1e}", file=sys.stderr)
    assert worst < TOLERANCE


def test_the_same_drafts_stand(served, monkeypatch):
    model, folder = served
    theirs, mine = ask(folder, drafts=2), ours(model, 2)
    if model.depths > 1:  # the runner that works without a GPU goes on with module 1 alone
        both, one = mine, model.mtp_config.model_copy(update={"num_nextn_predict_layers": 1})
        monkeypatch.setattr(model, "mtp_config", one)
        mine = ours(model, 2)
        assert mine["steps"] != both["steps"]
    report(theirs, mine)
    assert theirs == mine and 0 < theirs["accepted"][1] < theirs["steps"]
