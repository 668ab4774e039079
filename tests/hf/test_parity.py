"""Our export, loaded by transformers' own code: trunk, router, gradients, MTP modules and
generation agree.

Everything is float32 on the CPU. The tolerances are a few rounding errors of float32 (1.2e-7
relative) on values of size one, gathered over the layers; `pytest -rP` shows the largest
differences found.
"""

import pytest
import torch

from dsv3_mtp.hf import export_hf, load_hf
from dsv3_mtp.model.causal_lm import DeepseekV3MTP
from dsv3_mtp.model.layers import rotary_angles
from dsv3_mtp.model.moe import Gate
from dsv3_mtp.model.output import LossSettings
from tests.conftest import tiny
from tests.made_runs import randomise, write_run

transformers = pytest.importorskip("transformers", reason="the hf extra is not installed")

TOLERANCE = 2e-6
GRADIENT_TOLERANCE = 1e-5
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
    "yarn_without_temperature": {
        "model.rope_scaling": YARN | {"mscale_all_dim": 0.0},
        "model.max_position_embeddings": 64,
    },
    "two_shared_unnormalised": {"model.n_shared_experts": 2, "model.norm_topk_prob": False},
}


def close(
    ours: torch.Tensor, theirs: torch.Tensor, what: str, tolerance: float = TOLERANCE
) -> None:
    """Largest difference over the largest value of the tensor (at least 1) is within the
    tolerance.
    """
    difference = ((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1)).item()
    print(f"{what}: {difference:.1e}")
    assert difference <= tolerance, what


def read_by_transformers(folder, modules: int):
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", local_files_only=True
    )
    # transformers 5.23 finds MTP weights by a pattern that names layer 61 alone: name this model's
    # layers.
    first = model.config.num_hidden_layers
    model._keys_to_ignore_on_load_unexpected = [
        rf"model\.layers\.{first + k}\..*" for k in range(modules)
    ]
    return model.eval()


@pytest.fixture(scope="module", params=CASES)
def pair(request, tmp_path_factory):
    """(our model, transformers' reading of its export): made once, and changed by no test."""
    folder = tmp_path_factory.mktemp("pair")
    config = tiny(
        {"train.dtype": "float32", "mtp.num_nextn_predict_layers": 2, **CASES[request.param]}
    )
    model = randomise(DeepseekV3MTP(config.model, config.mtp))
    export_hf(write_run(folder / "run", config, model), folder / "hf", dtype="fp32")
    theirs = read_by_transformers(folder / "hf", 2)
    theirs.config.name_or_path = str(folder / "hf")
    return model, theirs


@torch.no_grad()
def test_every_layers_hidden_states_and_the_logits_agree(pair):
    ours, theirs = pair
    tokens = torch.randint(64, (2, 14))
    out = theirs(tokens, output_hidden_states=True)
    x, angles = ours.model.embed_tokens(tokens), rotary_angles(ours.config, torch.arange(14))
    close(x, out.hidden_states[0], "embedding", 0)
    for number, layer in enumerate(ours.model.layers, start=1):
        x, _ = layer(x, angles, None)
        if number < len(ours.model.layers):  # transformers' last entry is normed
            close(x, out.hidden_states[number], f"layer {number}")
    close(ours.model.norm(x), out.hidden_states[-1], "final norm")
    close(ours.lm_head(ours.model.norm(x)), out.logits, "logits")


@torch.no_grad()
def test_routers_choose_the_same_experts_with_the_same_weights(pair):
    ours, theirs = pair
    tokens = torch.randint(64, (3, 14))
    chosen: dict[str, list] = {"ours": [], "theirs": []}
    for gate in ours.gates():
        gate.register_forward_hook(lambda module, args, out: chosen["ours"].append(out[:2]))
    for layer in theirs.model.layers[ours.config.first_k_dense_replace :]:
        layer.mlp.experts.register_forward_pre_hook(
            lambda module, args: chosen["theirs"].append(args[1:3])
        )
    theirs(tokens)
    ours.logits(torch.cat([tokens, tokens[:, :3]], 1))
    assert isinstance(ours.gates()[0], Gate) and len(chosen["theirs"]) == 2
    for number, ((experts, weights), (their_experts, their_weights)) in enumerate(
        zip(chosen["ours"], chosen["theirs"], strict=False)
    ):
        order, their_order = experts.argsort(-1), their_experts.argsort(-1)
        assert torch.equal(experts.gather(-1, order), their_experts.gather(-1, their_order))
        close(
            weights.gather(-1, order),
            their_weights.gather(-1, their_order),
            f"router {number} weights",
        )


def mtp_model(theirs):
    from transformers.cache_utils import MtpCache
    from transformers.modeling_layers import MtpModel

    return MtpModel.from_pretrained(theirs).eval(), MtpCache(config=theirs.config.get_mtp_config())


def their_hidden_states(theirs, module, cache, tokens, length):
    """Trunk and MTP hidden states by transformers' inference code; its positions move on by one per
    depth.
    """
    hidden = [theirs.model(tokens[:, :length]).last_hidden_state]
    for depth in range(1, 1 + module.num_mtp_layers):
        positions = torch.arange(depth, depth + length)[None]
        ids = tokens[:, depth : depth + length]
        hidden.append(module.forward_layer(depth - 1, hidden[-1], positions, cache, input_ids=ids))
    return hidden


@torch.no_grad()
def test_mtp_hidden_states_agree_with_transformers_own_inference(pair):
    ours, theirs = pair
    module, cache = mtp_model(theirs)
    tokens = torch.randint(64, (1, 12 + 1 + 2))
    hidden = [rows.inputs[0] for rows in ours.head_rows(tokens).rows]
    for depth, state in enumerate(their_hidden_states(theirs, module, cache, tokens, 12)):
        close(hidden[depth], state, f"depth {depth}")


def test_gradients_of_one_training_step_agree_main_loss_and_mtp(pair):
    ours, theirs = pair
    module, cache = mtp_model(theirs)
    tokens, length, weights = torch.randint(64, (1, 12 + 1 + 2)), 12, (0.3, 0.15)
    out = ours(tokens, settings=LossSettings(weights))
    out.loss.backward()
    loss = torch.zeros(())
    for depth, state in enumerate(their_hidden_states(theirs, module, cache, tokens, length)):
        target = tokens[:, depth + 1 : depth + 1 + length]
        part = torch.nn.functional.cross_entropy(
            theirs.lm_head(state).flatten(0, 1), target.flatten()
        )
        loss = loss + (1.0, *weights)[depth] * part
    loss.backward()
    close(out.loss, loss, "loss")
    their_gradients = {name: p.grad for name, p in theirs.named_parameters()}
    for name, parameter in module.layers.named_parameters():
        name = name.replace(".mtp_block.", ".").replace(".post_norm.", ".shared_head.norm.")
        name = f"mtp.layers.{name}"
        their_gradients[name] = parameter.grad
    worst = 0.0
    for name, parameter in ours.named_parameters():
        expected = their_gradients[name]
        difference = ((parameter.grad - expected).abs().max() / expected.abs().max()).item()
        worst = max(worst, difference)
        assert difference <= GRADIENT_TOLERANCE, name
    print(f"gradients: {worst:.1e}")


@pytest.mark.parametrize("depths", [1, 2])
def test_generate_with_mtp_equals_plain_greedy_and_our_own_greedy(make_run, tmp_path, depths):
    run, ours = make_run(
        mtp__num_nextn_predict_layers=depths,
        model__max_position_embeddings=64,
        model__initializer_range=0.3,
    )
    export_hf(run, tmp_path / "hf", dtype="fp32")
    theirs = read_by_transformers(tmp_path / "hf", depths)
    for seed in range(3):
        prompt = torch.randint(64, (1, 5), generator=torch.Generator().manual_seed(seed))
        settings = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None}
        settings["attention_mask"] = torch.ones_like(prompt)
        plain = theirs.generate(prompt, **settings)
        assert torch.equal(theirs.generate(prompt, use_mtp=True, **settings), plain)
        tokens = prompt
        with torch.no_grad():
            for _ in range(24):
                x = torch.cat([tokens, tokens[:, :1].expand(-1, 1 + depths)], 1)
                tokens = torch.cat([tokens, ours.logits(x)[0, :, -1].argmax(-1, keepdim=True)], 1)
        assert torch.equal(tokens, plain)


def test_what_transformers_saves_is_imported_back(pair, tmp_path, monkeypatch):
    ours, theirs = pair
    # transformers writes the trunk alone
    monkeypatch.setattr(theirs.config, "num_nextn_predict_layers", 0)
    theirs.save_pretrained(tmp_path / "saved", max_shard_size="20KB")
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) > 1
    model, tokenizer = load_hf(tmp_path / "saved")
    assert (model.config, model.depths, tokenizer) == (ours.config, 0, None)
    state = ours.state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name
