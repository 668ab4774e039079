"""The key contract against DeepSeek-V3's own list of tensors, and against the model in memory."""

import pytest
import torch

from dsv3_mtp.hf.keys import slots, summarise
from dsv3_mtp.model.causal_lm import DeepseekV3MTP

# The tensors of one layer in the released index (README_WEIGHTS.md, model.safetensors.index.json);
# FP8 ones starred.
ATTENTION = [
    "input_layernorm.weight",
    "post_attention_layernorm.weight",
    "self_attn.q_a_proj.weight*",
    "self_attn.q_b_proj.weight*",
    "self_attn.q_a_layernorm.weight",
    "self_attn.kv_a_proj_with_mqa.weight*",
    "self_attn.kv_a_layernorm.weight",
    "self_attn.kv_b_proj.weight*",
    "self_attn.o_proj.weight*",
]
DENSE = ["mlp.gate_proj.weight*", "mlp.up_proj.weight*", "mlp.down_proj.weight*"]
MOE = [
    "mlp.gate.weight",
    "mlp.gate.e_score_correction_bias",
    "mlp.shared_experts.gate_proj.weight*",
    "mlp.shared_experts.up_proj.weight*",
    "mlp.shared_experts.down_proj.weight*",
]
EXPERT = ["gate_proj.weight*", "up_proj.weight*", "down_proj.weight*"]
MTP = [
    "embed_tokens.weight",
    "enorm.weight",
    "hnorm.weight",
    "eh_proj.weight",
    "shared_head.norm.weight",
    "shared_head.head.weight",
]


def released(layers: int, dense: int, experts: int, modules: int) -> list[str]:
    names = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
    for layer in range(layers + modules):
        own = ATTENTION + (DENSE if layer < dense else MOE) + (MTP if layer >= layers else [])
        own += [
            f"mlp.experts.{e}.{name}" for e in range(experts) for name in EXPERT if layer >= dense
        ]
        names += [f"model.layers.{layer}.{name}" for name in own]
    return names


@pytest.mark.parametrize("modules", [0, 1, 2])
def test_names_and_the_fp8_ones_are_those_of_the_released_index(tiny_config, modules):
    ours = [slot.name + "*" * slot.quantised for slot in slots(tiny_config.model, modules)]
    assert sorted(ours) == sorted(released(3, 1, 8, modules))


def test_only_the_router_bias_is_float32(tiny_config):
    wide = {
        slot.name.partition("mlp.")[2] for slot in slots(tiny_config.model, 1) if slot.is_float32
    }
    assert wide == {"gate.e_score_correction_bias"}


CASES = [
    {},
    {"mtp.num_nextn_predict_layers": 3},
    {"model.q_lora_rank": None},
    {"model.n_shared_experts": 2},
    {"model.first_k_dense_replace": 0},
    {"mtp.num_nextn_predict_layers": 3, "mtp.share_weights": True},
]


@pytest.mark.parametrize("overrides", CASES, ids=str)
def test_slots_fill_every_number_of_the_model_exactly_once(make_tiny_config, overrides):
    config = make_tiny_config(overrides)
    model = DeepseekV3MTP(config.model, config.mtp)
    state = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
    for slot in slots(config.model, len(model.mtp.layers)):
        part = state[slot.key][slot.index]
        assert part.shape == slot.shape, slot
        if not slot.alias:
            part += 1
    assert all((value == 1).all() for value in state.values())


def test_aliases_repeat_the_shared_embedding_and_head(tiny_config):
    aliases = {slot.name: slot.key for slot in slots(tiny_config.model, 2) if slot.alias}
    assert aliases == {
        f"model.layers.{layer}.{name}": key
        for layer in (3, 4)
        for name, key in (
            ("embed_tokens.weight", "model.embed_tokens.weight"),
            ("shared_head.head.weight", "lm_head.weight"),
        )
    }


def test_experts_with_the_same_problem_share_a_line():
    names = [f"model.layers.1.mlp.experts.{e}.up_proj.weight" for e in (0, 1, 2, 5)]
    problems = [(name, "missing") for name in names]
    problems += [
        ("lm_head.weight", "missing"),
        ("model.layers.2.mlp.experts.7.up_proj.weight", "missing"),
    ]
    assert summarise(problems) == [
        "model.layers.1.mlp.experts.[0-2, 5].up_proj.weight: missing",
        "lm_head.weight: missing",
        "model.layers.2.mlp.experts.7.up_proj.weight: missing",
    ]
