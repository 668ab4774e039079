"""Our export, served by vLLM: log-probabilities, greedy tokens, and which drafts stand.

VLLM_PYTHON names the python of an environment with vLLM's CPU build (docs/huggingface.md). vLLM
zeroes the embedding that a module reads at slot 0, that of t_1; here that token's embedding is zero
already, which leaves nothing to differ.
"""

import os
from pathlib import Path

import pytest

from dsv3_mtp.model.causal_lm import DeepseekV3MTP
from tests.hf import served

PYTHON = os.environ.get("VLLM_PYTHON", "")
pytestmark = [
    pytest.mark.serve,
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="VLLM_PYTHON names no python that has vLLM"),
]


@pytest.fixture(scope="module", params=[1, 2], ids=["D=1", "D=2"])
def half_trained(request, tmp_path_factory) -> tuple[DeepseekV3MTP, Path]:
    """A model of D modules and its export."""
    return served.half_trained(tmp_path_factory.mktemp("served"), request.param, silent=True)


def ask(folder: Path, drafts: int) -> dict:
    return served.ask(PYTHON, "vllm_engine.py", folder, drafts)


def test_log_probabilities_and_greedy_tokens_are_ours(half_trained):
    model, folder = half_trained
    theirs = ask(folder, drafts=0)
    assert theirs["tokens"] == served.ours(model, 0)["tokens"]
    assert served.largest_difference(model, theirs["logprobs"]) < served.TOLERANCE


def test_the_same_drafts_stand(half_trained, monkeypatch):
    model, folder = half_trained
    theirs, mine = ask(folder, drafts=2), served.ours(model, 2)
    if model.depths > 1:  # the runner that works without a GPU goes on with module 1 alone
        both, one = mine, model.mtp_config.model_copy(update={"num_nextn_predict_layers": 1})
        monkeypatch.setattr(model, "mtp_config", one)
        mine = served.ours(model, 2)
        assert mine["steps"] != both["steps"]
    served.report("vLLM", theirs, mine)
    assert theirs == mine and 0 < theirs["accepted"][1] < theirs["steps"]
