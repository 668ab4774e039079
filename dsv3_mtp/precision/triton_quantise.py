"""The quantiser of quantise.py as one Triton kernel: each number is read once, in row-major or
transposed order. And the way back for weights in block-FP8: a code is read and a number written.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv3_mtp.precision.quantise import EDGE, ROW, Scale, Tile

WARPS = 8  # 64 numbers of a tile in each thread


def quantise(x: Tensor, tile: Tile, scale: Scale) -> tuple[Tensor, Tensor]:
    """(M, K) of any strides -> codes (M, K) row-major and scale_inv, of 1 x 128 tiles column-major:
    cuBLAS's order.
    """
    rows, columns = x.shape
    grid = triton.cdiv(columns, EDGE), triton.cdiv(rows, EDGE)
    codes = torch.empty(rows, columns, dtype=torch.float8_e4m3fn, device=x.device)
    if tile == ROW:
        # (M, K/128)
        scale_inv = torch.empty(grid[0], rows, dtype=torch.float32, device=x.device).t()
    else:
        # (M/128, K/128)
        scale_inv = torch.empty(grid[1], grid[0], dtype=torch.float32, device=x.device)
    if x.numel():
        _quantise[grid](
            *(
                x,
                codes,
                scale_inv,
                rows,
                columns,
                *x.stride(),
                *scale_inv.stride(),
                torch.finfo(x.dtype).max,
            ),
            BY_ROW=tile == ROW,
            POW2=scale == "pow2",
            EDGE=EDGE,
            num_warps=WARPS,
        )
    return codes, scale_inv


def dequantise(codes: Tensor, scale_inv: Tensor, dtype: torch.dtype) -> Tensor:
    """What matrices in block-FP8 stand for, rounded once.

    Args:
        codes: (M, rows, columns) uint8, contiguous: the bits of E4M3.
        scale_inv: (M, rows/128, columns/128) float32, contiguous.
    """
    matrices, rows, columns = codes.shape
    blocks = triton.cdiv(rows, EDGE), triton.cdiv(columns, EDGE)
    if codes.dtype != torch.uint8 or scale_inv.shape != (matrices, *blocks):
        raise ValueError(
            f"scales of codes {codes.dtype} {tuple(codes.shape)}: must be of shape "
            f"{(matrices, *blocks)} (got {tuple(scale_inv.shape)})"
        )
    codes, scale_inv = codes.contiguous(), scale_inv.float().contiguous()
    out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    if codes.numel():
        grid = blocks[1], blocks[0], matrices
        _dequantise[grid](codes, scale_inv, out, rows, columns, EDGE=EDGE, num_warps=WARPS)
    return out


@triton.jit
def _dequantise(codes, scale_inv, out, rows, columns, EDGE: tl.constexpr):
    """One program takes a block. Numbers are made of bits: E4M3 is a type of newer GPUs only."""
    row = tl.program_id(1) * EDGE + tl.arange(0, EDGE)
    column = tl.program_id(0) * EDGE + tl.arange(0, EDGE)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    place = tl.program_id(2).to(tl.int64) * rows * columns
    place += row.to(tl.int64)[:, None] * columns + column[None, :]
    block = (tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0)
    scale = tl.load(scale_inv + block + tl.program_id(0))
    code = tl.load(codes + place, mask=inside, other=0).to(tl.int32)
    exponent, fraction = (code >> 3) & 15, code & 7
    normal = (((exponent + 120) << 23) | (fraction << 20)).to(tl.float32, bitcast=True)
    size = tl.where(exponent > 0, normal, fraction.to(tl.float32) * 0.001953125)
    size = tl.where((code & 127) == 127, float("nan"), size)
    numbers = tl.where(code >= 128, -size, size) * scale
    tl.store(out + place, numbers.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _quantise(
    x,  # (rows, columns)
    codes,  # (rows, columns), contiguous
    scale_inv,
    rows,
    columns,
    x_row,
    x_column,
    scale_row,
    scale_column,
    largest,  # number of the type of x
    BY_ROW: tl.constexpr,
    POW2: tl.constexpr,
    EDGE: tl.constexpr,
):
    """One program takes 128 x 128 numbers: a block, or 128 tiles of 1 x 128."""
    row = tl.program_id(1) * EDGE + tl.arange(0, EDGE)
    column = tl.program_id(0) * EDGE + tl.arange(0, EDGE)
    inside = (row < rows)[:, None] & (column < columns)[None, :]  # (EDGE, EDGE)
    wide_row, wide_column = row.to(tl.int64)[:, None], column.to(tl.int64)[None, :]
    numbers = tl.load(x + wide_row * x_row + wide_column * x_column, mask=inside, other=0.0).to(
        tl.float32
    )
    # |x| as bits has the order of |x|, with infinity and then nan on top, which a maximum of
    # floats may lose.
    amax = tl.max(numbers.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1)  # (EDGE,)
    if BY_ROW:
        factor, inverse = _scales(amax, largest, POW2)
        scaled = numbers * factor[:, None]
        tl.store(
            scale_inv + row * scale_row + tl.program_id(0) * scale_column, inverse, mask=row < rows
        )
    else:
        factor, inverse = _scales(tl.max(amax, 0), largest, POW2)
        scaled = numbers * factor
        tl.store(
            scale_inv + tl.program_id(1) * scale_row + tl.program_id(0) * scale_column, inverse
        )
    # Not tl.clamp, which may turn nan into a number.
    scaled = tl.where(scaled > 448.0, 448.0, scaled)
    scaled = tl.where(scaled < -448.0, -448.0, scaled)
    tl.store(
        codes + wide_row * columns + wide_column, scaled.to(codes.dtype.element_ty), mask=inside
    )


@triton.jit
def _scales(amax, largest, POW2: tl.constexpr):
    """quantise.scales from the bits of amax, and their reciprocals; float64 because float32
    divisions are inexact.
    """
    factor = (448.0 / amax.to(tl.float32, bitcast=True).to(tl.float64)).to(tl.float32)
    factor = tl.where(factor == float("inf"), largest, factor)
    if POW2:
        factor = (factor.to(tl.int32, bitcast=True) & -0x800000).to(tl.float32, bitcast=True)
    factor = tl.where((amax == 0) | (amax >= 0x7F800000), 1.0, factor)
    return factor, (1.0 / factor.to(tl.float64)).to(tl.float32)
