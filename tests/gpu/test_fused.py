"""Fused kernels against the same operations one by one in float64, forward and backward, and what they promise."""

import pytest
import torch

from dsv3_mtp import fused, losses
from dsv3_mtp.config import Config
from dsv3_mtp.model import attention, dispatch, layers
from dsv3_mtp.model.causal_lm import DeepseekV3MTP
from dsv3_mtp.precision.quantise import BLOCK, ROW, dequantise, quantise
from tests.precision.test_quantise import samples

ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 4e-3}


@pytest.fixture(autouse=True)
def compiled():
    note = fused.enable()
    assert note == "fused GPU kernels, by torch.compile", note
    yield
    fused.disable()


def arguments(name: str) -> tuple:
    """Random float64 inputs on the CPU."""
    rows, width, tokens = 96, 40, 24
    if name == "to_heads":
        query, kv = torch.randn(2, 16, 3, 24, dtype=torch.float64), torch.randn(2, 16, 3, 32, dtype=torch.float64)
        k_rope = torch.randn(2, 16, 40, dtype=torch.float64)[..., 32:]
        return query, kv, k_rope, torch.randn(2, 16, 4, dtype=torch.float32)
    numbers = [torch.randn(rows, n, dtype=torch.float64) for n in (2 * width, width, width, width)]
    gates = torch.rand(rows, dtype=torch.float64)
    return {
        "silu_mul": (numbers[1], numbers[2]),
        "silu_mul_backward": (numbers[1], numbers[2], numbers[3]),
        "weighted_swiglu": (numbers[0], gates),
        "weighted_swiglu_backward": (numbers[1], numbers[0], gates),
        "gather_sum": (numbers[1], torch.randint(rows, (tokens, 4))),
    }[name]


FUNCTIONS = [layers.silu_mul, layers.silu_mul_backward, attention.to_heads]
FUNCTIONS += [dispatch.weighted_swiglu, dispatch.weighted_swiglu_backward, dispatch.gather_sum]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.function.__name__)
def test_a_fused_function_equals_its_operations_in_float64(function, dtype):
    given = [x.to(dtype) if x.dtype == torch.float64 else x for x in arguments(function.function.__name__)]
    exact = [x.double().requires_grad_() if x.dtype == dtype else x for x in given]
    low = [x.cuda().requires_grad_() if x.dtype == dtype else x.cuda() for x in given]
    expected, got = (f(*x) for f, x in ((function.function, exact), (function, low)))
    if isinstance(expected, torch.Tensor):
        expected, got = (expected,), (got,)
    grads = [torch.randn(x.shape, dtype=torch.float64).to(dtype) for x in expected]
    wanted = [torch.autograd.grad(expected, [x for x in exact if x.requires_grad], [g.double() for g in grads])]
    found = [torch.autograd.grad(got, [x for x in low if x.requires_grad], [g.cuda() for g in grads])]
    for want, have in zip((*expected, *wanted[0]), (*got, *found[0]), strict=True):
        assert have.dtype == dtype
        assert (have.double().cpu() - want).norm() < ROUNDING[dtype] * want.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_fused_cross_entropy_equals_float64(dtype):
    logits = (3 * torch.randn(64, 500)).to(dtype)
    targets, weight = torch.randint(500, (64,)), torch.rand(64)
    exact = logits.double().requires_grad_()
    nll = torch.nn.functional.cross_entropy(exact, targets, reduction="none")
    (wanted,) = torch.autograd.grad((nll * weight.double()).sum(), exact)
    grad, got, prediction = losses._fused_cross_entropy(logits.cuda(), targets.cuda(), weight.cuda())
    assert (got.double().cpu() - nll).norm() < 1e-6 * nll.norm()
    assert (grad.double().cpu() - wanted).norm() < ROUNDING[dtype] * wanted.norm()
    assert torch.equal(logits.gather(1, prediction.cpu()[:, None]).squeeze(1), logits.amax(1))


@pytest.mark.parametrize("tile", [ROW, BLOCK], ids=["row", "block"])
@pytest.mark.parametrize("scale", ["pow2", "fp32"])
def test_the_compiled_quantiser_is_bit_for_bit_that_of_the_cpu(tile, scale):
    for kind in ("normal", "zeros", "outliers", "tiny", "wide", "infinite"):
        for dtype in (torch.float32, torch.bfloat16):
            for x in (
                samples(kind, (256, 384), dtype),
                samples(kind, (129, 257), dtype),
                samples(kind, (384, 130), dtype).t(),
            ):
                codes, scale_inv = quantise(x.cuda(), tile, scale)
                want, want_scale = quantise(x, tile, scale)
                assert torch.equal(codes.cpu().view(torch.uint8), want.view(torch.uint8)), (kind, dtype, x.shape)
                assert torch.equal(scale_inv.cpu(), want_scale), (kind, dtype, x.shape)
                values = dequantise(codes, scale_inv, tile)
                assert torch.equal(values.cpu().isnan(), dequantise(want, want_scale, tile).isnan())


def test_a_model_with_fused_kernels_has_the_loss_and_gradients_of_one_without(make_tiny_config):
    config: Config = make_tiny_config()
    model = DeepseekV3MTP(config.model, config.mtp)
    model.init_weights(0)
    model.cuda()
    tokens = torch.randint(64, (2, 16 + 1 + model.depths)).cuda()
    results = []
    for switch in (fused.enable, fused.disable):
        switch()
        out = model(tokens, balance_loss_weight=1e-4)
        results.append([out.loss, *torch.autograd.grad(out.loss, list(model.parameters()))])
    for ours, plain in zip(*results, strict=True):
        assert (ours - plain).norm() <= 1e-5 * plain.norm() + 1e-9
