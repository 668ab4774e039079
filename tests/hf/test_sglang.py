"""Our export, served by SGLang on a CPU: log-probabilities, greedy tokens, and which drafts stand.

SGLANG_PYTHON names the python of an environment with SGLang (docs/huggingface.md). Its compiled CPU
kernels are replaced by plain torch (sglang_kernels.py); all else is SGLang's. Its CPU path knows no
rotary embedding but YaRN's, which the model therefore has; some prompts go beyond the original
length.
"""

import os
from pathlib import Path

import pytest

from dsv3_mtp.model.causal_lm import DeepseekV3MTP
from tests.hf import served

PYTHON = os.environ.get("SGLANG_PYTHON", "")
pytestmark = [
    pytest.mark.serve,
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="SGLANG_PYTHON names no python that has SGLang"),
]
YARN = {
    "type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}


@pytest.fixture(scope="module")
def half_trained(tmp_path_factory) -> tuple[DeepseekV3MTP, Path]:
    """A model of one module, all that SGLang drafts with, and its export."""
    folder = tmp_path_factory.mktemp("served")
    return served.half_trained(folder, 1, silent=False, overrides={"model.rope_scaling": YARN})


def ask(folder: Path, drafts: int) -> dict:
    return served.ask(PYTHON, "sglang_engine.py", folder, drafts)


def test_log_probabilities_and_greedy_tokens_are_ours(half_trained):
    model, folder = half_trained
    theirs = ask(folder, drafts=0)
    assert theirs["tokens"] == served.ours(model, 0)["tokens"]
    assert served.largest_difference(model, theirs["logprobs"]) < served.TOLERANCE


@pytest.mark.parametrize("drafts", [1, 2])
def test_the_same_drafts_stand(half_trained, drafts):
    """The second draft is the module's again, from its own hidden state."""
    model, folder = half_trained
    theirs, mine = ask(folder, drafts), served.ours(model, drafts)
    served.report("SGLang", theirs, mine)
    assert theirs == mine and 0 < theirs["accepted"][-1] < theirs["steps"]
