"""FP8 layers against plain torch on operands that were rounded by hand."""

import pytest
import torch

from dsv3_mtp.precision.emulate import Emulated, accumulate
from dsv3_mtp.precision.linear import FP8Linear, Recipe
from dsv3_mtp.precision.quantise import BLOCK, ROW, dequantise, quantise


def rounded(x, tile, scale="pow2"):
    return dequantise(*quantise(x, tile, scale), tile)


def relative(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize("scale", ["pow2", "fp32"])
@pytest.mark.parametrize(
    ("tokens", "inputs", "outputs"), [(256, 128, 384), (37, 200, 72), (1, 16, 8)]
)
def test_the_three_products_are_those_of_the_rounded_operands(scale, tokens, inputs, outputs):
    x = torch.randn(tokens, inputs, requires_grad=True)
    layer = FP8Linear(inputs, outputs, Recipe(Emulated(scale)))
    grad = torch.randn(tokens, outputs)
    y = layer(x)
    y.backward(grad)
    with torch.no_grad():
        w8 = rounded(layer.weight, BLOCK, scale).double()
        assert relative(y, rounded(x, ROW, scale).double() @ w8.T) < 1e-6
        assert relative(x.grad, rounded(grad, ROW, scale).double() @ w8) < 1e-6
        along_tokens = rounded(grad.T, ROW, scale).double() @ rounded(x.T, ROW, scale).double().T
        assert relative(layer.weight.grad, along_tokens) < 1e-6


def test_block_tiles_of_gradients_change_the_input_gradient_only():
    x, weight, grad = (
        torch.randn(256, 128),
        torch.randn(128, 128),
        torch.exp(2 * torch.randn(256, 128)),
    )
    results = []
    for tile in (ROW, BLOCK):
        a, w = x.clone().requires_grad_(), weight.clone().requires_grad_()
        Recipe(Emulated(), tile).linear(a, w).backward(grad)
        results.append((a.grad, w.grad))
    assert torch.equal(results[0][1], results[1][1])
    with torch.no_grad():
        expected = rounded(grad, BLOCK) @ rounded(weight, BLOCK)
    assert relative(results[1][0], expected) < 1e-6 < relative(results[0][0], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_experts_equal_one_layer_per_expert(dtype):
    counts = [130, 0, 1, 69]
    x, weight = (
        torch.randn(200, 96).to(dtype).requires_grad_(),
        torch.randn(4, 48, 96).to(dtype).requires_grad_(),
    )
    grad, recipe = torch.randn(200, 48).to(dtype), Recipe(Emulated())
    y = recipe.grouped_linear(x, weight, counts)
    y.backward(grad)
    for expert, (rows, part) in enumerate(
        zip(x.detach().split(counts), grad.split(counts), strict=True)
    ):
        at = slice(sum(counts[:expert]), sum(counts[: expert + 1]))
        a, w = rows.clone().requires_grad_(), weight[expert].detach().clone().requires_grad_()
        out = recipe.linear(a, w)
        out.backward(part)
        assert torch.equal(y[at], out) and torch.equal(x.grad[at], a.grad)
        assert torch.equal(weight.grad[expert], w.grad)
    assert not weight.grad[1].any()


def test_bfloat16_products_equal_those_in_float32_up_to_the_rounding_of_the_output():
    a, b = torch.randn(64, 256).bfloat16(), torch.randn(32, 256).bfloat16()
    narrow = Emulated()(a, ROW, b, BLOCK)
    wide = Emulated()(a.float(), ROW, b.float(), BLOCK)
    assert narrow.dtype == torch.bfloat16
    assert relative(narrow, wide) < 2**-8


def test_the_error_of_a_layer_is_that_of_e4m3_and_tiles_confine_outliers():
    """Relative error of y, dx, dW: 2^-4 / sqrt(3) per operand at worst; measured 3.7e-2 for
    Gaussian tensors.
    """
    x, weight = torch.randn(512, 256), torch.randn(256, 256)
    y = Emulated()(x, ROW, weight, BLOCK)
    assert 0.03 < relative(y, x.double() @ weight.double().T) < 0.045
    x[5] *= 1e6  # one token far away: the others keep their precision
    y = Emulated()(x, ROW, weight, BLOCK)
    exact = x.double() @ weight.double().T
    assert relative(y[6:], exact[6:]) < 0.045
    assert relative(Emulated()(x, BLOCK, weight, BLOCK)[6:], exact[6:]) > 0.1


def test_a_narrow_accumulator_loses_bits_with_the_length_and_promotion_wins_them_back():
    # positive: the sum grows and swallows its terms
    a, b = torch.rand(32, 4096), torch.rand(32, 4096)
    exact = a.double() @ b.double().T
    error = {mode: relative(accumulate(a, b, mode), exact) for mode in ("fp22", "fp22_promote128")}
    assert error["fp22"] > 1e-3
    assert error["fp22_promote128"] < error["fp22"] / 10
    short = accumulate(a[:, :32], b[:, :32], "fp22")
    assert relative(short, a[:, :32].double() @ b[:, :32].double().T) < 2**-13
