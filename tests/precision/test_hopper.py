"""What hopper.py hands to cuBLAS, on any device, against the rules of ScaledBlas.cpp in torch; its
grouped products in Triton's interpreter.
"""

import os
from functools import partial
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F

from dsv3_mtp.config import FP8Config
from dsv3_mtp.model.moe import MoE
from dsv3_mtp.ops.compute import building
from dsv3_mtp.precision import hopper
from dsv3_mtp.precision.convert import UNSUPPORTED, fp8_compute, fp8_layers
from dsv3_mtp.precision.emulate import Emulated
from dsv3_mtp.precision.linear import Recipe
from dsv3_mtp.precision.quantise import BLOCK, ROW, dequantise, quantise

interpreted = pytest.mark.skipif(
    find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") != "1",
    reason="needs triton and TRITON_INTERPRET=1",
)


@pytest.fixture(autouse=True)
def cublas(monkeypatch):
    """What F.scaled_mm calls."""
    monkeypatch.setattr(torch, "_scaled_mm_v2", scaled_mm)


def scaled_mm(a, b, scale_a, recipe_a, swizzle_a, scale_b, recipe_b, swizzle_b, bias, dtype, *rest):
    """torch's checks of block scaling on Hopper, then the product in float32."""
    (scale_a,), (scale_b,) = scale_a, scale_b
    (rows, inner), columns = a.shape, b.shape[1]
    assert swizzle_a == swizzle_b == [] and bias is None and not any(rest)
    assert a.dtype == b.dtype == torch.float8_e4m3fn and dtype in (torch.bfloat16, torch.float32)
    # rows: the leading dimension of 1 x 128 scales
    assert inner % 16 == 0 and columns % 16 == 0 and rows % 16 == 0
    for step, one, codes in ((*a.stride(), a), (*b.stride()[::-1], b)):
        assert one == 1 and step >= inner and step % 16 == 0 and codes.data_ptr() % 16 == 0
    tiles = -(-inner // 128)
    assert recipe_a == [F.ScalingType.BlockWise1x128.value] and scale_a.shape == (rows, tiles)
    assert scale_a.stride(0) == 1 and (
        scale_a.stride(1) == rows or (tiles, scale_a.stride(1)) == (1, 1)
    )
    if recipe_b == [F.ScalingType.BlockWise1x128.value]:
        tile, shape = ROW, (columns, tiles)
    else:
        assert recipe_b == [F.ScalingType.BlockWise128x128.value]
        tile, shape = BLOCK, (-(-tiles // 4) * 4, -(-columns // 128))
    assert scale_b.shape == shape and scale_b.stride(0) == 1
    assert scale_b.stride(1) == shape[0] or (shape[1], scale_b.stride(1)) == (1, 1)
    for scale in (scale_a, scale_b):
        assert scale.dtype == torch.float32 and scale.data_ptr() % 16 == 0
    inverse_b = scale_b if tile == ROW else scale_b.t()[:, :tiles]
    return (dequantise(a, scale_a, ROW) @ dequantise(b.t(), inverse_b, tile).T).to(dtype)


def close(ours, emulated, dtype):
    assert ours.shape == emulated.shape and ours.dtype == emulated.dtype == dtype
    torch.testing.assert_close(
        ours, emulated, rtol=2**-7 if dtype == torch.bfloat16 else 1e-5, atol=1e-4
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("tokens", "inputs", "outputs"),
    [(256, 512, 384), (37, 576, 160), (1, 16, 16), (130, 128, 7168), (8, 1024, 64)],
)
def test_operands_and_scales_are_laid_out_as_cublas_wants_them(dtype, tokens, inputs, outputs):
    x, weight, grad = (
        torch.randn(shape).to(dtype)
        for shape in ((tokens, inputs), (outputs, inputs), (tokens, outputs))
    )
    results = []
    for product in (hopper.ScaledMM(), Emulated()):
        a, w = x.clone().requires_grad_(), weight.clone().requires_grad_()
        y = Recipe(product).linear(a, w)
        y.backward(grad)
        results.append((y, a.grad, w.grad))
    for ours, emulated in zip(*results, strict=True):
        close(ours, emulated, dtype)


COUNTS = [[0, 300, 0], [128, 256, 128], [53, 0, 17], [0, 0, 0]]


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("inputs", "outputs"), [(128, 256), (16, 128), (256, 48)])
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_groups_are_multiplied_as_one_by_one(counts, inputs, outputs, dtype):
    rows = sum(counts)
    x, weight, grad = (
        torch.randn(s).to(dtype) for s in ((rows, inputs), (3, outputs, inputs), (rows, outputs))
    )
    results = []
    for product in (hopper.ScaledMM(), Emulated()):
        a, w = x.clone().requires_grad_(), weight.clone().requires_grad_()
        y = Recipe(product).grouped_linear(a, w, counts)
        y.backward(grad)
        results.append((y, a.grad, w.grad))
    for ours, emulated in zip(*results, strict=True):
        close(ours, emulated, dtype)
    for expert, count in enumerate(counts):
        assert bool(results[0][2][expert].any()) == bool(count)


@interpreted
@pytest.mark.parametrize(
    ("outputs", "inputs", "weights"), [(256, 128, 1), (48, 128, 4), (128, 48, 1)]
)
def test_all_groups_share_one_call_of_the_quantiser(monkeypatch, outputs, inputs, weights):
    """Weights take one call each where their blocks would hold rows of two of them."""
    shapes = []
    monkeypatch.setattr(
        hopper, "quantise", lambda x, *rest: (shapes.append(x.shape), quantise(x, *rest))[1]
    )
    x, weight = (
        torch.randn(512, inputs, requires_grad=True),
        torch.randn(4, outputs, inputs, requires_grad=True),
    )
    y = Recipe(hopper.ScaledMM()).grouped_linear(x, weight, [128, 0, 256, 128])
    assert len(shapes) == 1 + weights
    y.sum().backward()
    assert len(shapes) == 2 * (1 + weights) + 2


@interpreted
@pytest.mark.parametrize("tokens", [77, 0])
def test_a_layer_of_experts_computes_what_the_emulated_one_does(
    make_tiny_config, monkeypatch, tokens
):
    monkeypatch.setitem(UNSUPPORTED, "torch", lambda device: None)
    x = torch.randn(1, tokens, 32)
    results = []
    for backend in ("torch", "emulate"):
        torch.manual_seed(0)
        fp8 = FP8Config(enabled=True, backend=backend, modules=["routed_experts"])
        make = partial(MoE, make_tiny_config().model)
        compute, _ = fp8_compute(fp8, x.device, torch.bfloat16, make)
        with building(compute):
            moe = make()
        for parameter in moe.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        moe.gate.e_score_correction_bias[5] = -100.0  # an expert without rows
        assert list(fp8_layers(moe)) == ["experts"]
        a = x.clone().requires_grad_()
        y, _ = moe(a)
        (y * torch.linspace(-1, 1, 32)).sum().backward()
        results.append([y, a.grad, *(p.grad for p in moe.parameters() if p.grad is not None)])
    for ours, emulated in zip(*results, strict=True):
        assert ours.shape == emulated.shape
        # a code on the other side of a rounding, at most
        assert (ours - emulated).norm() <= 1e-3 * emulated.norm()
