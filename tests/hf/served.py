"""A half-trained model for the engines that serve exports, and what this project says of its
prompts: some drafts stand and others fall (test_vllm.py, test_sglang.py).
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from dsv3_mtp.decode.generate import Settings, stream
from dsv3_mtp.hf import export_hf
from dsv3_mtp.model.causal_lm import DeepseekV3MTP
from tests.conftest import tiny
from tests.decode.plain import CYCLE, train_on_cycle
from tests.made_runs import randomise, write_run

SIZES = {  # vLLM's attention on CPUs takes heads whose width is a multiple of 16
    "model.qk_nope_head_dim": 32,
    "model.qk_rope_head_dim": 16,
    "model.v_head_dim": 32,
    "model.max_position_embeddings": 128,
    "train.dtype": "float32",
}
SECOND = 1  # t_1 of every prompt
PROMPTS = [
    [CYCLE[start], SECOND, *(CYCLE * 3)[start + 1 : start + 1 + more]]
    for start, more in ((0, 4), (3, 0), (5, 20), (7, 31), (2, 9))
]
NEW_TOKENS = 40
TOLERANCE = 1e-5  # of log-probabilities down to -15 in float32, over four layers


def half_trained(
    folder: Path, modules: int, *, silent: bool, overrides: dict[str, Any] | None = None
) -> tuple[DeepseekV3MTP, Path]:
    """A model and its export. silent: the embedding of SECOND is zero."""
    keys = {"mtp.num_nextn_predict_layers": modules, "run.name": "run", "run.dir": str(folder)}
    config = tiny(SIZES | keys | (overrides or {}))
    model = randomise(DeepseekV3MTP(config.model, config.mtp))
    train_on_cycle(model, 15)
    model.requires_grad_(False).eval()
    if silent:
        model.model.embed_tokens.weight[SECOND] = 0
    export_hf(write_run(folder / "run", config, model), folder / "hf", dtype="fp32")
    return model, folder / "hf"


def ask(python: str, client: str, folder: Path, drafts: int) -> dict:
    """What the engine says of an export: `client` is the file here that `python` runs."""
    request = {
        "folder": str(folder),
        "prompts": PROMPTS,
        "new_tokens": NEW_TOKENS,
        "drafts": drafts,
    }
    kept = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [python, str(Path(__file__).with_name(client))],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        env=kept,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def ours(model: DeepseekV3MTP, drafts: int) -> dict:
    """Greedy tokens, and the counts as engines make them: a step tests all its drafts, also those
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


def report(engine: str, theirs: dict, mine: dict) -> None:
    for name, counts in ((engine, theirs), ("here", mine)):
        print(f"{name}: {counts['steps']} steps, accepted {counts['accepted']}", file=sys.stderr)


def largest_difference(model: DeepseekV3MTP, logprobs: list) -> float:
    """Of the log-probabilities of all tokens behind the slots 0, 1, .. of each prompt."""
    worst = 0.0
    for prompt, said in zip(PROMPTS, logprobs, strict=True):
        with torch.no_grad():
            logits = model.logits(torch.tensor([[*prompt, *[0] * model.lookahead]]))[0, 0]
        mine = logits[: len(prompt) - 1].log_softmax(-1)
        worst = max(worst, (mine - torch.tensor(said)).abs().max().item())
    print(f"log-probabilities: {worst:.1e}", file=sys.stderr)
    return worst
