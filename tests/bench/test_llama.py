"""bench/llama.py: what is written for llama.cpp, why it does not run, and its tokens where it is
installed.
"""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from dsv3_mtp.decode.generate import Settings, generate
from dsv3_mtp.model.causal_lm import DeepseekV3MTP
from tests.conftest import tiny
from tests.made_runs import randomise

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))  # as Python does for a script
import llama as tool

NEEDED = "llama_cpp", "gguf"
MISSING = [name for name in NEEDED if importlib.util.find_spec(name) is None]


def made(**keys) -> DeepseekV3MTP:
    config = tiny({f"model.{key}": value for key, value in keys.items()})
    return randomise(DeepseekV3MTP(config.model, config.mtp)).requires_grad_(False).eval()


def test_every_weight_of_the_trunk_is_written_once(tmp_path):
    model = made()
    tool.save(model, tmp_path)
    listing, count = json.loads((tmp_path / "tensors.json").read_text()), 0
    for file, dtype, shape in listing.values():
        data = np.fromfile(tmp_path / file, dtype=dtype).reshape(shape)
        assert np.isfinite(data).all()
        count += data.size
    trunk = {name: x for name, x in model.state_dict().items() if not name.startswith("mtp.")}
    assert count == sum(x.numel() for x in trunk.values())
    file, _, shape = listing["blk.1.attn_k_b.weight"]
    up = trunk["model.layers.1.self_attn.kv_b_proj.weight"]
    heads, nope = model.config.num_attention_heads, model.config.qk_nope_head_dim
    keys = torch.from_numpy(np.fromfile(tmp_path / file, dtype=np.float32).reshape(shape))
    assert torch.equal(keys, up.unflatten(0, (heads, -1))[:, :nope].transpose(1, 2))


@pytest.mark.parametrize("keys", [{"q_lora_rank": None}, {"rope_scaling": "yarn"}], ids=str)
def test_what_llama_cpp_reads_otherwise_is_not_run(keys):
    if "rope_scaling" in keys:
        keys = {"rope_scaling": {"type": "yarn", "factor": 4.0}}
        keys["rope_scaling"]["original_max_position_embeddings"] = 16
    said = tool.report(sys.executable, made(**keys), [1, 2, 3], 4, 1)
    assert said == "llama.cpp: not run: it reads no model without q_lora_rank, and YaRN otherwise"


@pytest.mark.skipif(not MISSING, reason="llama.cpp is installed here")
def test_where_it_is_not_installed_that_is_said():
    said = tool.report(sys.executable, made(), [1, 2, 3], 4, 1)
    assert said.startswith("llama.cpp: not run: ModuleNotFoundError") and MISSING[0] in said


@pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")
def test_its_tokens_are_ours():
    model, prompt = made(), [1, 2, 3]
    child = tool.Child(sys.executable, model, prompt, 12)
    _, tokens = child()
    child.close()
    assert tokens == generate(model, [prompt], Settings(max_new_tokens=12)).tokens[0]
