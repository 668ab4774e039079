"""The trunk against Hugging Face's DeepseekV3 code: same weights, same hidden states, logits, routing, gradients."""

import pytest
import torch

from dsv3_mtp.model.causal_lm import DeepseekV3MTP

transformers = pytest.importorskip("transformers", reason="the hf extra is not installed")

YARN = {
    "type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
CASES = {
    "v3": {},
    "no_query_compression": {"model.q_lora_rank": None},
    "no_groups": {"model.n_group": 1, "model.topk_group": 1},
    "yarn": {"model.rope_scaling": YARN, "model.max_position_embeddings": 64},
    "two_shared_unnormalised": {"model.n_shared_experts": 2, "model.norm_topk_prob": False},
}


@pytest.fixture(params=CASES)
def pair(request, make_tiny_config):
    """(our model, HF's) in float32 with the same random weights and router biases."""
    config = make_tiny_config({"mtp.mode": "none", **CASES[request.param]})
    ours = DeepseekV3MTP(config.model, config.mtp)
    ours.init_weights(0)
    for name, parameter in ours.named_parameters():
        if name.endswith("norm.weight"):
            parameter.data.uniform_(0.5, 1.5)
    for gate in ours.gates():
        gate.e_score_correction_bias.uniform_(0.0, 0.2)
    keys = config.to_dict()["model"]
    scaling = keys.pop("rope_scaling")
    theta = keys.pop("rope_theta")
    rope = {"rope_type": "default"} if scaling is None else {"rope_type": "yarn", **scaling}
    hf_config = transformers.DeepseekV3Config(
        **keys,
        num_key_value_heads=keys["num_attention_heads"],
        rope_interleave=True,
        rope_parameters={**rope, "rope_theta": theta},
        attention_bias=False,
        tie_word_embeddings=False,
        attn_implementation="eager",
    )
    theirs = transformers.DeepseekV3ForCausalLM(hf_config).eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)  # DeepSeek's names on both sides
    return ours, theirs


def test_hidden_states_and_logits_agree_to_float32_rounding(pair):
    ours, theirs = pair
    tokens = torch.randint(64, (2, 16))
    with torch.no_grad():
        out = theirs(tokens, output_hidden_states=True)
        hidden, _ = ours.hidden_states(torch.cat([tokens, tokens[:, :1]], 1))
        logits = ours.logits(torch.cat([tokens, tokens[:, :1]], 1))[0]
    torch.testing.assert_close(hidden[0], out.hidden_states[-1], rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(logits, out.logits, rtol=2e-5, atol=2e-5)


def test_gradients_of_one_training_step_agree(pair):
    ours, theirs = pair
    tokens = torch.randint(64, (2, 17))
    ours(tokens).loss.backward()
    # HF shifts the labels itself and averages over T - 1 targets: give it the shifted ones explicitly.
    logits = theirs(tokens[:, :-1]).logits
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
    theirs_grads = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs_grads[name].grad, rtol=1e-4, atol=2e-6, msg=name)
