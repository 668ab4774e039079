"""What the export says of a reader is what the reader does, where it can be asked here."""

import pytest
import torch

from dsv3_mtp.hf.keys import slots
from dsv3_mtp.hf.readers import READERS, equal_blocks, findings
from dsv3_mtp.precision.quantise import BLOCK, dequantise, quantise


@pytest.fixture(scope="module")
def transformers_reads():
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    return Fp8Dequantize(None)._dequantize_one


@pytest.mark.parametrize("rows", [64, 128, 129, 192, 205, 256, 320, 384, 390])
def test_transformers_reads_fp8_as_the_rule_says(transformers_reads, rows):
    spread = 2.0 ** torch.arange(rows).unsqueeze(1).div(16, rounding_mode="floor")  # scales differ
    codes, scales = quantise(torch.randn(rows, 64) * spread, BLOCK, "stored")
    ours = dequantise(codes, scales, BLOCK)
    if equal_blocks(rows) is None:
        with pytest.raises(ValueError, match="not divisible by scale grid"):
            transformers_reads(codes, scales, torch.float32)
        return
    theirs = transformers_reads(codes, scales, torch.float32)
    assert torch.equal(theirs, ours) == equal_blocks(rows)


@pytest.mark.parametrize(
    ("settings", "modules", "dtype", "fatal"),
    [
        ({}, 1, "bf16", {}),
        ({}, 1, "fp32", {}),
        ({}, 2, "bf16", {}),
        # the sides of a very small model are below 128, which transformers reads rightly
        ({}, 1, "fp8", {"vllm": "q_lora_rank 16, ", "sglang": "moe_intermediate_size 16"}),
        ({"q_lora_rank": None}, 1, "fp8", {"vllm": "refuses FP8 with model.moe", "sglang": ""}),
        ({"q_lora_rank": 192}, 1, "fp8", {"transformers": "misreads", "vllm": "", "sglang": ""}),
        ({"kv_lora_rank": 205}, 1, "fp8", {"transformers": "refuses", "vllm": "", "sglang": ""}),
        (
            {"q_lora_rank": 128, "moe_intermediate_size": 128, "intermediate_size": 256},
            1,
            "fp8",
            {},
        ),
    ],
)
def test_who_cannot_use_a_model(make_tiny_config, settings, modules, dtype, fatal):
    config = make_tiny_config({f"model.{key}": value for key, value in settings.items()})
    found = findings(config.model, slots(config.model, 1), modules, dtype)
    said = {one.reader: str(one) for one in found if one.fatal}
    assert said.keys() == fatal.keys()
    assert all(fatal[name] in said[name] and READERS[name] in said[name] for name in said)
    drafts = [str(one) for one in found if "draft" in one.text]
    assert bool(drafts) == (modules > 1)


def test_deepseeks_own_sizes_suit_the_engines(make_tiny_config):
    sizes = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128}
    sizes |= {"v_head_dim": 128, "q_lora_rank": 1536, "hidden_size": 1024}
    sizes |= {"intermediate_size": 2048, "moe_intermediate_size": 256}
    config = make_tiny_config({f"model.{key}": value for key, value in sizes.items()})
    assert findings(config.model, slots(config.model, 1), 1, "bf16") == []
    (only,) = findings(config.model, slots(config.model, 1), 1, "fp8")
    assert only.reader == "transformers" and "kv_a_proj_with_mqa.weight [576, 1024]" in only.text
