"""Weights that stay in block-FP8: what is made of them, when, and how much of it at a time."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from bench.meter import Meter
from dsv3_mtp.model.moe import MoE
from dsv3_mtp.ops import choice
from dsv3_mtp.ops.compute import Compute, building, linear
from dsv3_mtp.precision.emulate import Emulated
from dsv3_mtp.precision.linear import FP8Linear, Recipe
from dsv3_mtp.precision.quantise import BLOCK, ROW, dequantise, quantise, scale_shape
from dsv3_mtp.precision.stored import (
    SCALE,
    StoredLinear,
    is_codes,
    kept,
    numbers,
    put,
    stored,
    weight_of,
)

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16}


def fill(layer, name):
    """Codes of finite numbers, and scales of any float32."""
    codes, scales = getattr(layer, name), getattr(layer, name + SCALE)
    codes.copy_(torch.randint(0, 256, codes.shape, dtype=torch.uint8))
    codes.masked_fill_((codes & 127) == 127, 3)
    scales.copy_((torch.rand_like(scales) + 0.5) * 2.0**-9)
    return codes, scales


@DTYPES
@pytest.mark.parametrize("shape", [(1, 1), (130, 257), (128, 256), (5, 300)])
def test_every_code_is_the_number_that_loading_makes_of_it(dtype, shape):
    codes = torch.randint(0, 256, shape, dtype=torch.uint8)
    scale = torch.rand(scale_shape(shape)) * 2.0 ** torch.randint(-140, 20, scale_shape(shape))
    expected = dequantise(codes.view(torch.float8_e4m3fn), scale, BLOCK).to(dtype)
    known = (codes & 127) != 127  # the two codes that are no number
    found = [numbers(codes, scale, dtype)]
    with choice.plain():
        found.append(numbers(codes, scale, dtype))
    for one in found:
        assert torch.equal(one[known].view(BITS[dtype]), expected[known].view(BITS[dtype]))
        assert one[~known].isnan().all()


@DTYPES
@pytest.mark.parametrize(("rows", "parts"), [(200, 2), (136, 2), (136, 1), (256, 2)])
def test_each_part_of_an_experts_matrix_has_blocks_of_its_own(dtype, rows, parts):
    layer = torch.nn.Module()
    put(layer, "up", (3, parts * rows, 150), parts)
    codes, scales = fill(layer, "up")
    assert scales.shape == (3, parts, *scale_shape((rows, 150)))
    for plain in (False, True):
        with choice.plain() if plain else torch.no_grad():
            stack = kept(layer, "up", dtype)
            whole, each = stack.whole(), [stack[expert] for expert in range(3)]
        assert torch.equal(whole, torch.stack(each))
        for expert in range(3):
            for part in range(parts):
                own = codes[expert, part * rows : (part + 1) * rows].view(torch.float8_e4m3fn)
                expected = dequantise(own, scales[expert, part], BLOCK).to(dtype)
                assert torch.equal(each[expert][part * rows : (part + 1) * rows], expected)


def test_a_projection_multiplies_as_the_one_it_stands_for():
    x, make = torch.randn(3, 7, 200).bfloat16(), partial(linear, "attention", 200, 150)
    layer, plain = StoredLinear(make, 200, 150), make()
    fill(layer, "weight")
    assert [name for name, _ in layer.named_parameters()] == ["weight"]
    plain.weight.data = weight_of(layer, "weight", torch.bfloat16)
    assert torch.equal(layer(x), plain(x))
    x.requires_grad_()  # rows may learn, codes never do
    layer(x).sum().backward()
    assert layer.weight.grad is None and x.grad.abs().sum() > 0


RECIPE = Recipe(Emulated("pow2"))


def rounded(x):
    return dequantise(*quantise(x, ROW), ROW)


@pytest.mark.parametrize("power_of_two", [True, False])
def test_fp8_products_take_the_codes_themselves(power_of_two):
    """Not what they are rounded to; where their scales are powers of two, it is the same."""
    x, make = torch.randn(3, 7, 200).bfloat16(), lambda: FP8Linear(200, 150, RECIPE)
    layer, plain = StoredLinear(make, 200, 150), make()
    codes, scales = fill(layer, "weight")
    if power_of_two:
        scales.copy_(2.0 ** torch.randint(-12, -6, scales.shape))
        codes[::128, ::128] = 0x7E  # 448: the largest of each block
    weight = dequantise(codes.view(torch.float8_e4m3fn), scales, BLOCK)
    expected = (rounded(x.flatten(0, 1)) @ weight.T).view(3, 7, 150)
    torch.testing.assert_close(layer(x).float(), expected, rtol=2**-8, atol=1e-5)
    plain.weight.data = weight_of(layer, "weight", torch.bfloat16)
    assert torch.equal(layer(x), plain(x)) == power_of_two


@pytest.mark.parametrize("width", [128, 136])
def test_fp8_experts_take_the_codes_where_no_block_is_in_two_matrices(width):
    layer = torch.nn.Module()
    put(layer, "up", (3, 2 * width, 150), 2)
    codes, scales = fill(layer, "up")
    stack, x, counts = kept(layer, "up", torch.bfloat16), torch.randn(9, 150).bfloat16(), [4, 0, 5]
    assert (stack.blocks() is None) == (width == 136)
    parts = [
        dequantise(codes[e, part].view(torch.float8_e4m3fn), scales[e, p], BLOCK)
        for e in range(3)
        for p, part in enumerate((slice(0, width), slice(width, None)))
    ]
    weight = torch.cat(parts).view(3, 2 * width, 150)
    if width == 136:  # quantised anew, by blocks of the whole
        weight = torch.stack(
            [dequantise(*quantise(own.bfloat16(), BLOCK), BLOCK) for own in weight]
        )
    rows = zip(rounded(x).split(counts), weight, strict=True)
    expected = torch.cat([part @ own.T for part, own in rows])
    found = RECIPE.grouped_linear(x, stack, counts)
    torch.testing.assert_close(found.float(), expected, rtol=2**-8, atol=1e-5)


@pytest.fixture
def layers(make_tiny_config):
    """A layer with experts in codes, and the same with the bfloat16 weights that they stand for."""
    config = make_tiny_config({"model.hidden_size": 256, "model.moe_intermediate_size": 128}).model
    with building(stored(Compute())):
        narrow = MoE(config)
    wide = MoE(config)
    torch.nn.init.normal_(wide.gate.weight)
    narrow.gate.weight.data.copy_(wide.gate.weight)
    for module, other in zip(narrow.modules(), wide.modules(), strict=True):
        for name, parameter in [*module.named_parameters(recurse=False)]:
            if is_codes(parameter):
                fill(module, name)
                other.get_parameter(name).data = weight_of(module, name, torch.bfloat16)
    return narrow.requires_grad_(False), wide.bfloat16().requires_grad_(False)


def test_experts_are_made_one_at_a_time_and_only_those_that_have_rows(layers):
    (narrow, wide), x = layers, torch.randn(1, 1, 256).bfloat16()
    narrow.gate.bfloat16()
    assert torch.equal(narrow(x)[0], wide(x)[0])
    made, expert = [], 2 * 3 * 256 * 128
    for layer in layers:
        with Meter() as meter:
            layer(x)
        made.append(meter.peak)
    # gate and up of an expert, or one matrix of the shared one; of the layer's eight all would be
    # 8 experts
    assert 0 < made[0] - made[1] < expert


def test_experts_in_codes_refuse_to_be_learned_through(layers):
    x = torch.randn(1, 4, 256).bfloat16().requires_grad_()
    layers[0].gate.bfloat16()
    with pytest.raises(AssertionError, match="no backward"):
        layers[0](x)
    assert F.mse_loss(layers[1](x)[0].float(), torch.zeros(1, 4, 256)).requires_grad
