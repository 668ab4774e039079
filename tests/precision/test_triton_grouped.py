"""The grouped FP8 kernel in Triton's interpreter against float64 products of what was dequantised;
on a GPU tests/gpu/test_precision.py runs it.
"""

import os

import pytest
import torch

from dsv3_mtp.precision.quantise import BLOCK, ROW, Scale, dequantise, quantise

pytest.importorskip("triton", reason="triton is not installed; it comes with torch for CUDA")
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1"
)
ROWS = [128, 0, 256]
FLOAT32 = 2e-7  # relative rounding of sums of 384 numbers, none of which is large beside the others


def in_tiles(x: torch.Tensor, scale: Scale = "pow2"):
    """Codes, scales, and what they stand for, in float64."""
    codes, inverse = quantise(x, ROW, scale)
    return codes.contiguous(), inverse, dequantise(codes, inverse, ROW, torch.float64)


def in_blocks(weight: torch.Tensor, scale: Scale = "pow2"):
    each = [quantise(matrix, BLOCK, scale) for matrix in weight]
    exact = [dequantise(*parts, BLOCK, torch.float64) for parts in each]
    codes, inverse = zip(*each, strict=True)
    return torch.stack(codes), torch.stack(inverse), torch.stack(exact)


def wide(*shape: int) -> torch.Tensor:
    """Magnitudes that differ much from tile to tile, so that a wrong scale shows."""
    return torch.exp(3 * torch.randn(shape)) * torch.randn(shape)


def relative(ours: torch.Tensor, exact: torch.Tensor) -> float:
    return float((ours.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("scale", ["pow2", "fp32"])
def test_rows_of_every_group_meet_their_own_matrix(scale):
    from dsv3_mtp.precision import triton_grouped

    (x, x_inv, x_exact), (w, w_inv, w_exact) = (
        in_tiles(wide(384, 272), scale),
        in_blocks(wide(3, 144, 272), scale),
    )
    got = triton_grouped.by_rows(x, x_inv, w, w_inv, ROWS, torch.float32)
    parts = zip(x_exact.split(ROWS), w_exact, strict=True)
    assert relative(got, torch.cat([a @ b.T for a, b in parts])) < FLOAT32
    for group in (0, 2):  # the whole is not carried by one of them
        rows = slice(*((0, 128), (), (128, 384))[group])
        assert relative(got[rows], x_exact[rows] @ w_exact[group].T) < FLOAT32


def test_matrices_may_be_parts_of_wider_ones_of_which_nothing_else_is_read():
    from dsv3_mtp.precision import triton_grouped

    x, x_inv, x_exact = in_tiles(wide(384, 80))
    w, w_inv, w_exact = in_blocks(wide(3, 48, 80))
    nan = torch.tensor(float("nan")).to(x.dtype)
    wide_x, side_by_side = nan.expand(384, 96).clone(), nan.expand(48, 3, 96).clone()
    wide_x[:, :80], side_by_side[..., :80] = x, w.transpose(0, 1)
    matrices = side_by_side[..., :80].transpose(0, 1), w_inv
    got = triton_grouped.by_rows(wide_x[:, :80], x_inv, *matrices, ROWS, torch.bfloat16)
    parts = zip(x_exact.split(ROWS), w_exact, strict=True)
    assert got.dtype == torch.bfloat16
    assert relative(got, torch.cat([a @ b.T for a, b in parts])) < 6e-3  # of bfloat16


@pytest.mark.parametrize("scale", ["pow2", "fp32"])
def test_sums_over_the_rows_of_every_group(scale):
    from dsv3_mtp.precision import triton_grouped

    (a, a_inv, a_exact), (b, b_inv, b_exact) = (in_tiles(wide(n, 384), scale) for n in (144, 272))
    got = triton_grouped.over_rows(a, a_inv, b, b_inv, ROWS, torch.float32)
    for ours, left, right in zip(got, a_exact.split(ROWS, 1), b_exact.split(ROWS, 1), strict=True):
        if left.shape[1]:
            assert relative(ours, left @ right.T) < FLOAT32
        else:
            assert not ours.any()  # a group without rows


def test_scales_multiply_the_sums_of_128_columns_in_float32():
    """With powers of two as scales and codes of few bits every sum is exact: the bits of the
    loop.
    """
    from dsv3_mtp.precision import triton_grouped

    x, w = (torch.randint(-8, 9, shape).float() for shape in ((384, 256), (3, 128, 256)))
    x *= 2.0 ** torch.randint(-3, 4, (384, 2)).repeat_interleave(128, 1)
    (x8, x_inv, x_exact), (w8, w_inv, _) = in_tiles(x), in_blocks(w)
    assert torch.equal(x_exact, x.double())
    got = triton_grouped.by_rows(x8, x_inv, w8, w_inv, ROWS, torch.float32)
    loop = [part @ matrix.T for part, matrix in zip(x.split(ROWS), w, strict=True)]
    assert torch.equal(got, torch.cat(loop))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": [100, 28, 256]}, "rows: must be 3 multiples of 128"),
        ({"rows": [128, 256]}, "rows: must be 3"),
        ({"x": torch.zeros(384, 128)}, "x: must be torch.float8_e4m3fn"),
        ({"x_inv": torch.ones(384, 2)}, "scales of x: must be float32"),
        ({"weight_inv": torch.ones(3, 1, 2)}, "scales of weight: must be float32"),
    ],
)
def test_what_does_not_fit_is_refused_before_a_pointer_is_followed(change, message):
    from dsv3_mtp.precision import triton_grouped

    (x, x_inv, _), (weight, weight_inv, _) = in_tiles(wide(384, 128)), in_blocks(wide(3, 48, 128))
    given = {"x": x, "x_inv": x_inv, "weight": weight, "weight_inv": weight_inv, "rows": ROWS}
    with pytest.raises(ValueError, match=message):
        triton_grouped.by_rows(**(given | change), dtype=torch.float32)
