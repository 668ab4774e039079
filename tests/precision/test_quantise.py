"""Quantisation against Transformer Engine's semantics, written out here once more, element by
element, in numpy.
"""

import itertools
import math

import numpy as np
import pytest
import torch

from dsv3_mtp.precision.quantise import BLOCK, LARGEST, ROW, dequantise, quantise, scales

SHAPES = [(1, 1), (7, 130), (128, 128), (129, 257), (3, 1000), (256, 64)]
LARGEST_OF = {
    torch.float32: 3.4028234663852886e38,
    torch.bfloat16: 3.3895313892515355e38,
    torch.float16: 65504.0,
}


def samples(kind: str, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(7))
    flat = x.view(-1)
    if kind == "zeros":
        x = x * (torch.arange(x.numel()).view(shape) // 64 % 2)  # whole half-tiles of zeros
    elif kind == "outliers":
        flat[:: max(1, flat.numel() // 5)] *= 1e4
    elif kind == "tiny":
        x = x * 1e-38 if dtype != torch.float16 else x * 1e-7
    elif kind == "wide":
        x = torch.exp(4 * x)
    elif kind == "infinite":
        flat[flat.numel() // 2] = math.inf
    return x.to(dtype)


def expected(x: torch.Tensor, tile: tuple[int, int], scale: str) -> tuple[np.ndarray, np.ndarray]:
    """The formulae of the kernel, tile by tile: values in float32, rounding to E4M3 by the list of
    its 256 numbers.
    """
    rows, columns = (math.ceil(size / edge) for size, edge in zip(x.shape, tile, strict=True))
    wide = x.float().numpy()
    codes, scale_inv = np.zeros(wide.shape, np.float32), np.zeros((rows, columns), np.float32)
    for row, column in itertools.product(range(rows), range(columns)):
        part = np.s_[row * tile[0] : (row + 1) * tile[0], column * tile[1] : (column + 1) * tile[1]]
        amax = np.float32(np.abs(wide[part]).max())
        if amax == 0 or not np.isfinite(amax):
            factor = np.float32(1)
        else:
            with np.errstate(over="ignore"):
                factor = np.float32(448) / amax
            if np.isinf(factor):
                factor = np.float32(LARGEST_OF[x.dtype])
            if scale == "pow2":
                factor = np.ldexp(np.float32(1), np.frexp(factor)[1] - 1)
        codes[part] = nearest(np.clip(wide[part] * factor, -448, 448))
        scale_inv[row, column] = np.float32(1) / factor
    return codes, scale_inv


def nearest(x: np.ndarray) -> np.ndarray:
    """The E4M3 number next to each x, ties to the even mantissa: steps of 2^(e-3), e >= -6."""
    exponent = np.maximum(np.frexp(x)[1] - 1, -6)
    step = np.ldexp(np.float64(1), exponent - 3)
    return (np.rint(x / step) * step).astype(np.float32)


@pytest.mark.parametrize("tile", [ROW, BLOCK], ids=["row", "block"])
@pytest.mark.parametrize("scale", ["pow2", "fp32"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_codes_and_scales_are_those_of_the_formulae_bit_for_bit(tile, scale, dtype):
    for shape, kind in itertools.product(
        SHAPES, ["normal", "zeros", "outliers", "tiny", "wide", "infinite"]
    ):
        x = samples(kind, shape, dtype)
        codes, scale_inv = quantise(x, tile, scale)
        want_codes, want_scale = expected(x, tile, scale)
        assert codes.shape == x.shape and scale_inv.dtype == torch.float32
        assert np.array_equal(scale_inv.numpy(), want_scale), (shape, kind)
        assert np.array_equal(codes.float().numpy(), want_codes), (shape, kind)


def test_pow2_scales_never_overflow_and_use_at_least_half_of_the_range():
    amax = torch.logspace(-30, 30, 4001, dtype=torch.float64).float()
    factor = scales(amax, torch.float32, "pow2")
    assert torch.equal(torch.frexp(factor).mantissa, torch.full_like(factor, 0.5))
    largest = amax.double() * factor
    assert bool((largest <= LARGEST).all()) and bool((largest > LARGEST / 2).all())


def test_infinity_saturates_and_nan_stays_in_its_own_tile():
    x = torch.ones(2, 256)
    x[0, 3], x[1, 200] = math.inf, math.nan
    codes, scale_inv = quantise(x, ROW)
    values = dequantise(codes, scale_inv, ROW)
    assert values[0, 3] == LARGEST and values[1, 200].isnan()
    x[0, 3] = x[1, 200] = 1.0
    values[0, 3] = values[1, 200] = 1.0
    assert torch.equal(values, x)


@pytest.mark.parametrize("tile", [ROW, BLOCK], ids=["row", "block"])
def test_the_error_is_that_of_three_mantissa_bits(tile):
    x = torch.randn(300, 500)
    codes, scale_inv = quantise(x, tile, "fp32")
    error = (dequantise(codes, scale_inv, tile) - x).abs()
    # half a step: 2^-4 of the value
    step = torch.clamp(x.abs() / 16, min=float(scale_inv.max() * 2.0**-10))
    assert bool((error <= step * 1.0001).all())


def test_with_pow2_scales_bfloat16_holds_what_is_dequantised_and_the_other_side_loses_nothing():
    x = torch.randn(256, 384)
    values = dequantise(*quantise(x, ROW), ROW)
    assert torch.equal(values, dequantise(*quantise(x, ROW), ROW, torch.bfloat16).float())
    blocks = dequantise(*quantise(x, BLOCK), BLOCK)
    # a block's codes serve W and W^T
    assert torch.equal(blocks.T, dequantise(*quantise(x.T, BLOCK), BLOCK))
