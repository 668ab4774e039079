"""What hopper.py hands to cuBLAS, on any device, against the rules of ScaledBlas.cpp in torch."""

import pytest
import torch
import torch.nn.functional as F

from dsv3_mtp.precision import hopper
from dsv3_mtp.precision.emulate import Emulated
from dsv3_mtp.precision.linear import Recipe
from dsv3_mtp.precision.quantise import BLOCK, ROW, dequantise


def scaled_mm(a, b, scale_a, recipe_a, scale_b, recipe_b, *, output_dtype):
    """torch's checks of block scaling on Hopper, then the product in float32."""
    (rows, inner), columns = a.shape, b.shape[1]
    assert a.dtype == b.dtype == torch.float8_e4m3fn and output_dtype in (torch.bfloat16, torch.float32)
    assert inner % 16 == 0 and columns % 16 == 0 and rows % 16 == 0  # rows: the leading dimension of 1 x 128 scales
    assert a.stride() == (inner, 1) and b.stride() == (1, inner)
    tiles = -(-inner // 128)
    assert recipe_a == F.ScalingType.BlockWise1x128 and scale_a.shape == (rows, tiles)
    assert scale_a.stride(0) == 1 and (scale_a.stride(1) == rows or (tiles, scale_a.stride(1)) == (1, 1))
    if recipe_b == F.ScalingType.BlockWise1x128:
        tile, shape = ROW, (columns, tiles)
    else:
        tile, shape = BLOCK, (-(-tiles // 4) * 4, -(-columns // 128))
    assert scale_b.shape == shape and scale_b.stride(0) == 1
    assert scale_b.stride(1) == shape[0] or (shape[1], scale_b.stride(1)) == (1, 1)
    for scale in (scale_a, scale_b):
        assert scale.dtype == torch.float32 and scale.data_ptr() % 16 == 0
    inverse_b = scale_b if tile == ROW else scale_b.t()[:, :tiles]
    return (dequantise(a, scale_a, ROW) @ dequantise(b.t(), inverse_b, tile).T).to(output_dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("tokens", "inputs", "outputs"), [(256, 512, 384), (37, 576, 160), (1, 16, 16), (130, 128, 7168), (8, 1024, 64)]
)
def test_operands_and_scales_are_laid_out_as_cublas_wants_them(monkeypatch, dtype, tokens, inputs, outputs):
    monkeypatch.setattr(F, "scaled_mm", scaled_mm)
    x, weight, grad = (
        torch.randn(shape).to(dtype) for shape in ((tokens, inputs), (outputs, inputs), (tokens, outputs))
    )
    results = []
    for product in (hopper.ScaledMM(), Emulated()):
        a, w = x.clone().requires_grad_(), weight.clone().requires_grad_()
        y = Recipe(product).linear(a, w)
        y.backward(grad)
        results.append((y, a.grad, w.grad))
    for ours, emulated in zip(*results, strict=True):
        assert ours.shape == emulated.shape
        torch.testing.assert_close(ours, emulated, rtol=2**-7 if dtype == torch.bfloat16 else 1e-5, atol=1e-4)


def test_an_expert_without_rows_multiplies_nothing(monkeypatch):
    monkeypatch.setattr(F, "scaled_mm", scaled_mm)
    x, weight = torch.randn(70, 64, requires_grad=True), torch.randn(3, 32, 64, requires_grad=True)
    y = Recipe(hopper.ScaledMM()).grouped_linear(x, weight, torch.tensor([53, 0, 17]))
    y.sum().backward()
    assert y.shape == (70, 32) and not weight.grad[1].any() and weight.grad[2].any()
