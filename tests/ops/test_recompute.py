"""Activation checkpointing changes what is kept for backward, and nothing else."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn

from bench.meter import Meter
from dsv3_mtp.model import block
from dsv3_mtp.model.causal_lm import DeepseekV3MTP
from dsv3_mtp.model.layers import RMSNorm
from dsv3_mtp.model.output import LossSettings
from dsv3_mtp.ops import choice
from dsv3_mtp.ops.attention import Core
from dsv3_mtp.ops.compute import Compute, building
from dsv3_mtp.ops.recompute import recomputed, recomputing
from tests.heads_under_test import HEADS

MODES = ("none", "selective", "full")
KINDS = HEADS | {"detach": {"mtp.detach": "all"}}


def build(
    config: Any, mode: Any, core: Core | None = None
) -> tuple[DeepseekV3MTP, torch.Tensor, torch.Tensor]:
    """A model, tokens and documents."""
    with building(Compute(core=core, recompute=mode)):
        model = DeepseekV3MTP(config.model, config.mtp)
    model.init_weights(0)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(
        0, config.model.vocab_size, (2, 16 + model.lookahead), generator=generator
    )
    return model, tokens, (torch.arange(tokens.shape[1]) // 7).expand_as(tokens)


@pytest.fixture(params=["torch", "C"])
def kernel(request):
    """Both ways to compute a training step on a CPU."""
    if request.param == "C":
        request.getfixturevalue("compiled")
        yield
    else:
        with choice.plain():
            yield


@pytest.mark.parametrize("mode", ["selective", "full"])
@pytest.mark.parametrize("heads", KINDS)
@pytest.mark.usefixtures("kernel")
def test_gradients_and_loads_are_bitwise_those_without_it(make_tiny_config, heads, mode):
    config, results = make_tiny_config({"mtp.num_nextn_predict_layers": 2, **KINDS[heads]}), {}
    for used in ("none", mode):
        model, tokens, documents = build(config, used)
        # documents change the attention core: with every other kind
        given = documents if [*KINDS].index(heads) % 2 else None
        out = model(tokens, given, settings=LossSettings(balance_loss_weight=0.1))
        out.loss.backward()
        grads = {
            f"grad {name}": p.grad for name, p in model.named_parameters() if p.grad is not None
        }
        results[used] = vars(out) | grads
    assert results["none"].keys() == results[mode].keys()
    for name, value in results["none"].items():
        assert torch.equal(value, results[mode][name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_mode_keeps_less_than_the_one_before(tiny_config, dtype):
    held, peak = [], []
    for mode in MODES:
        model, tokens, _ = build(tiny_config, mode)
        model.to(dtype)
        with Meter() as live:
            out = model(tokens)
            held.append(live.held)
            out.loss.backward()
        peak.append(live.peak)
    assert held[2] < held[1] < held[0]
    assert peak[2] < peak[1] < peak[0]


def test_selective_repeats_norms_up_projections_and_swiglu_once(tiny_config):
    calls: dict[str, Counter] = {}
    for mode in MODES:
        model, tokens, _ = build(tiny_config, mode)
        calls[mode] = Counter()
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear | RMSNorm):
                kind = name.split(".")[-1]
                module.register_forward_hook(
                    lambda *_, kind=kind, used=mode: calls[used].update([kind])
                )
        out = model(tokens)
        calls[mode].clear()
        out.loss.backward()
    blocks = tiny_config.model.num_hidden_layers + tiny_config.mtp.depths
    norms = ["input_layernorm", "post_attention_layernorm", "q_a_layernorm", "kv_a_layernorm"]
    assert calls["none"] == {}
    assert calls["selective"] == dict.fromkeys([*norms, "q_b_proj", "kv_b_proj"], blocks)
    assert calls["full"].keys() > calls["selective"].keys()


def test_what_is_made_again_is_made_from_what_was_made_again():
    weight = torch.randn(3, 3, requires_grad=True)
    x = torch.randn(2, 3, requires_grad=True)
    made = []

    def double(tensor: torch.Tensor) -> torch.Tensor:
        made.append("double")
        return 2 * tensor

    with Meter() as meter:
        with recomputing():
            hidden = recomputed(double, recomputed(double, x))
            y = (hidden @ weight) * hidden[:, :1]
        del hidden
        held = meter.held
    for _ in range(2):  # a graph may be used again
        made.clear()
        grads = torch.autograd.grad(y.sum(), (x, weight), retain_graph=True)
        assert made == ["double"] * 2
    plain = torch.autograd.grad(((4 * x @ weight) * (4 * x)[:, :1]).sum(), (x, weight))
    assert all(torch.equal(a, b) for a, b in zip(grads, plain, strict=True))
    assert held == 2 * y.numel() * y.element_size()  # y and the product, no hidden


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_nothing_is_recomputed_or_wrapped_without_a_gradient(tiny_config, monkeypatch, mode):
    model, tokens, _ = build(tiny_config, mode)
    plain, _, _ = build(tiny_config, "none")
    for name in ("checkpoint", "recomputing"):
        monkeypatch.setattr(block, name, None)  # a call would fail
    with torch.no_grad():
        assert torch.equal(model(tokens).loss, plain(tokens).loss)
