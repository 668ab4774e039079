"""FP8 weights of checkpoints: exact where it must be, bounded where it cannot."""

import pytest
import torch

from dsv3_mtp.precision.quantise import BLOCK, dequantise, scale_shape
from dsv3_mtp.precision.quantise import quantise as quantise_by

SHAPES = [(128, 128), (256, 384), (1, 1), (130, 257), (127, 129), (5, 300)]


def quantise(weight):
    return quantise_by(weight, BLOCK, "stored")


def random_matrix(shape, seed=0):
    """Magnitudes over many octaves, zeros included."""
    generator = torch.Generator().manual_seed(seed)
    exponents = torch.randint(-12, 4, shape, generator=generator).float()
    values = torch.randn(shape, generator=generator) * 2.0**exponents
    return torch.where(torch.rand(shape, generator=generator) < 0.1, 0.0, values)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantising_what_was_dequantised_gives_the_same_codes_and_scales(shape, dtype):
    codes, scale = quantise(random_matrix(shape).to(dtype))
    assert codes.shape == shape and scale.shape == scale_shape(shape)
    wide = dequantise(codes, scale, BLOCK)
    assert torch.equal(wide, wide.bfloat16().float())  # exact in bfloat16
    again, scale_again = quantise(wide.bfloat16())
    assert torch.equal(again.view(torch.uint8), codes.view(torch.uint8))
    assert torch.equal(scale_again, scale)


@pytest.mark.parametrize(
    "amax", [448.0, 448.1, 463.9, 464.0, 464.1, 224.0, 231.9, 232.0, 232.1, 240.0, 1e-3, 3e4]
)
def test_that_holds_for_every_largest_value_around_the_borders(amax):
    weight = torch.tensor([[amax, -amax / 2, amax / 3, 0.0, amax * 2**-9, amax * 2**-14]])
    codes, scale = quantise(weight)
    again, scale_again = quantise(dequantise(codes, scale, BLOCK))
    assert torch.equal(scale, scale_again) and torch.equal(codes.float(), again.float())
    assert torch.isfinite(codes.float()).all()


def test_scales_are_powers_of_two_one_per_block_and_the_error_is_half_a_step():
    weight = random_matrix((200, 300))
    codes, scale = quantise(weight)
    mantissa, _ = torch.frexp(scale)
    assert (mantissa == 0.5).all()
    error = (dequantise(codes, scale, BLOCK) - weight).abs()
    block_scale = scale.repeat_interleave(128, 0)[:200].repeat_interleave(128, 1)[:, :300]
    # 3 mantissa bits: half a step is 2^-4 of the value, below the smallest normal number 2^-6 it is
    # 2^-10 of the scale.
    assert (error <= torch.maximum(weight.abs() * 2**-4, block_scale * 2**-10)).all()


def test_a_block_of_zeros_has_scale_one():
    codes, scale = quantise(torch.zeros(3, 200))
    assert (scale == 1).all() and (codes.float() == 0).all()


def test_any_scales_and_block_sizes_are_dequantised():
    codes = torch.randn(70, 50).to(torch.float8_e4m3fn)
    scale = torch.rand(scale_shape((70, 50), (32, 16))) + 0.1
    expected = torch.stack(
        [codes.float()[r] * scale[r // 32, torch.arange(50) // 16] for r in range(70)]
    )
    assert torch.equal(dequantise(codes, scale, (32, 16)), expected)
