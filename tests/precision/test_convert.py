"""Which layers FP8 takes, what is said about it, and what a model computes with it."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from dsv3_mtp.config import FP8Config
from dsv3_mtp.model.causal_lm import DeepseekV3MTP, meta_model
from dsv3_mtp.ops.attention import sdpa
from dsv3_mtp.ops.compute import building
from dsv3_mtp.ops.cores import choose_attention
from dsv3_mtp.precision.convert import (
    UNSUPPORTED,
    choose_backend,
    choose_compute,
    fp8_compute,
    fp8_layers,
)

CPU = torch.device("cpu")
EMULATE = {"enabled": True, "backend": "emulate"}


@pytest.fixture
def make_model(make_tiny_config):
    """A model, and what was said about it, with these layers in FP8."""

    def make(fp8=None, dtype=torch.float32, **mtp):
        config = make_tiny_config({f"mtp.{key}": value for key, value in mtp.items()})
        meta = partial(meta_model, config.model, config.mtp)
        compute, note = fp8_compute(fp8 or FP8Config(enabled=False), CPU, dtype, meta)
        with building(compute):
            model = DeepseekV3MTP(config.model, config.mtp)
        model.init_weights(0)
        return model, note

    return make


def test_the_default_layers_are_those_of_v3(make_model):
    names = set(fp8_layers(make_model(FP8Config(**EMULATE))[0]))
    attention = {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"}
    dense, routed = {"gate_proj", "up_proj", "down_proj"}, {"shared_experts.gate_proj", "experts"}
    assert {f"model.layers.1.self_attn.{name}" for name in attention} <= names
    assert {f"model.layers.0.mlp.{name}" for name in dense} <= names
    assert {f"mtp.layers.0.mlp.{name}" for name in routed} <= names
    high = ("embed_tokens", "lm_head", "gate", "norm", "eh_proj")  # a router is called `gate`
    assert not [name for name in names if name.rpartition(".")[2] in high]
    assert len(names) == 4 * 5 + 3 + 3 * 4  # 4 blocks' attention, a dense layer, 3 MoE layers


def test_mtp_blocks_and_kinds_of_layers_can_be_left_out(make_model):
    def names(**settings):
        return set(fp8_layers(make_model(FP8Config(**EMULATE, **settings))[0]))

    assert not [name for name in names(mtp=False) if name.startswith("mtp.")]
    assert names(modules=["eh_proj"]) == {"mtp.layers.0.eh_proj"}
    assert all(name.endswith(".mlp.experts") for name in names(modules=["routed_experts"]))
    assert len(names(modules=["attention"], mtp=False)) == 3 * 5


@pytest.mark.parametrize("mode", ["sequential", "parallel", "none"])
def test_parameters_keep_their_names_and_values_and_losses_stay_close(make_model, mode):
    (high, _), (low, note) = make_model(mode=mode), make_model(FP8Config(**EMULATE), mode=mode)
    assert "emulate" in note and "layers" in note
    assert [n for n, _ in low.named_parameters()] == [n for n, _ in high.named_parameters()]
    assert all(
        torch.equal(a, b)
        for a, b in zip(low.state_dict().values(), high.state_dict().values(), strict=True)
    )
    tokens = torch.randint(64, (2, 17 + low.depths))
    losses = [model(tokens).loss for model in (high, low)]
    assert 0 < abs((losses[0] - losses[1]).item()) < 0.01 * losses[0].item()
    for loss in losses:
        loss.backward()
    for name, parameter in low.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name


def test_auto_is_off_without_a_gpu_and_says_why_and_how_to_have_it_all_the_same():
    backend, note = choose_backend(FP8Config(), CPU)
    assert backend is None and "no CUDA device" in note and "fp8.enabled: true emulates it" in note
    assert choose_backend(FP8Config(enabled=True), CPU)[0] == "emulate"
    assert choose_backend(FP8Config(enabled=False), CPU) == (None, "fp8: off (fp8.enabled: false)")


@pytest.mark.parametrize("backend", ["te", "torch"])
def test_a_named_backend_runs_or_is_refused(backend):
    assert choose_backend(FP8Config(backend=backend), CPU)[0] is None
    with pytest.raises(ValueError, match=rf"fp8.backend: {backend} needs a Hopper GPU"):
        choose_backend(FP8Config(enabled=True, backend=backend), CPU)


def test_a_model_without_such_layers_is_refused(make_model):
    with pytest.raises(ValueError, match="no layer of eh_proj"):
        make_model(FP8Config(**EMULATE, modules=["eh_proj"]), mode="none")


@pytest.mark.parametrize(
    ("backend", "dtype", "reason"),
    [
        ("te", torch.float32, "te needs train.dtype: bfloat16"),
        ("torch", torch.float32, "torch needs train.dtype: bfloat16"),
        ("te", torch.bfloat16, "sides are multiples of 16"),
        ("torch", torch.bfloat16, "sides are multiples of 16"),
    ],
)
def test_layers_that_a_backend_cannot_multiply_stay_as_they_are_or_are_refused(
    make_model, monkeypatch, backend, dtype, reason
):
    """The dtype is that of the run: the weights are float32 until DeepSpeed casts them."""
    monkeypatch.setitem(UNSUPPORTED, backend, lambda device: None)
    model, note = make_model(FP8Config(backend=backend), dtype)
    assert reason in note and not fp8_layers(model)
    with pytest.raises(ValueError, match=reason):
        make_model(FP8Config(enabled=True, backend=backend), dtype)


@pytest.mark.parametrize("name", ["fa4", "fa3", "fa2", "te"])
def test_a_named_attention_kernel_is_refused_on_a_cpu(name):
    arguments = {
        "heads": 2,
        "widths": (12, 8),
        "dtype": torch.bfloat16,
        "device": CPU,
        "masked": False,
    }
    with pytest.raises(ValueError, match=f"attention.backend: {name} needs a CUDA device"):
        choose_attention(name, **arguments)
    assert choose_attention("sdpa", **arguments) == (sdpa, "attention: sdpa (attention.backend)")
    core, note = choose_attention("auto", **arguments)
    assert core is None and note.startswith("attention: the CPU's own")


def test_another_core_takes_the_place_of_the_models_own(make_model, make_tiny_config):
    seen, config = [], make_tiny_config()

    def core(query, key, value, scale, first):
        seen.append((query.shape, value.shape, scale))
        scores = (query @ key.transpose(-1, -2) * scale).masked_fill(
            torch.ones(16, 16).triu(1).bool(), float("-inf")
        )
        return scores.softmax(-1) @ value

    tokens = torch.randint(64, (2, 18))
    expected = make_model()[0](tokens).loss
    compute, notes = choose_compute(config, CPU, partial(meta_model, config.model, config.mtp))
    assert notes == [] and compute.core is None  # of a CPU's usual choice nothing is said
    with building(replace(compute, core=core)):
        model = DeepseekV3MTP(config.model, config.mtp)
    model.init_weights(0)
    torch.testing.assert_close(model(tokens).loss, expected)
    assert seen == [((2, 2, 16, 12), (2, 2, 16, 8), 12**-0.5)] * 4
