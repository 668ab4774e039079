"""The FP8 products of all experts of a layer as one Triton kernel: V3's scales per 1 x 128 tile and
128 x 128 block, which torch's grouped product does not take.

Tensor cores sum 128 columns, then the two scales multiply that sum and float32 registers add it up:
V3's promotion (section 3.3.2). Every group has whole blocks of 128 rows, so no tile is in two.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv3_mtp.precision.quantise import BLOCK, EDGE, ROW, scale_shape

WARPS = 8  # two 128 x 128 sums in float32: 128 registers of each thread
STAGES = 3  # blocks of both operands on their way: 96 KiB of shared memory


def by_rows(
    x: Tensor,
    x_inv: Tensor,
    weight: Tensor,
    weight_inv: Tensor,
    rows: list[int],
    dtype: torch.dtype,
) -> Tensor:
    """Rows of group e times weight[e]^T.

    Args:
        x, weight: codes (M, K) and (E, N, K).
        x_inv, weight_inv: their scales, of 1 x 128 tiles (M, K/128), of blocks (E, N/128, K/128).
        rows: of each group; multiples of 128.
    Returns:
        (M, N)
    """
    (total, inner), (groups, columns, _) = x.shape, weight.shape
    _check("x", x, (total, inner), x_inv, scale_shape((total, inner), ROW))
    blocks = groups, *scale_shape((columns, inner), BLOCK)
    _check("weight", weight, (groups, columns, inner), weight_inv, blocks)
    ends = _ends(rows, groups, total, x.device)
    out = torch.empty(total, columns, dtype=dtype, device=x.device)
    grid = triton.cdiv(columns, EDGE), total // EDGE
    if out.numel():
        _grouped[grid](
            *(x, x_inv, weight, weight_inv, ends, out, total, columns, inner),
            *(x.stride(0), *x_inv.stride(), weight.stride(1), *weight_inv.stride()[1:]),
            *(weight.stride(0), weight_inv.stride(0), 0),
            **_constants(groups, over_rows=False),
        )
    return out


def over_rows(
    a: Tensor, a_inv: Tensor, b: Tensor, b_inv: Tensor, rows: list[int], dtype: torch.dtype
) -> Tensor:
    """Of each group a b^T over its part of the columns; zeros where it has none.

    Args:
        a, b: codes (N, M) and (K, M), of matrices that were transposed.
        a_inv, b_inv: their scales, of 1 x 128 tiles: (N, M/128) and (K, M/128).
        rows: of each group, of the M; multiples of 128.
    Returns:
        (E, N, K)
    """
    (height, total), (width, _), groups = a.shape, b.shape, len(rows)
    _check("a", a, (height, total), a_inv, scale_shape((height, total), ROW))
    _check("b", b, (width, total), b_inv, scale_shape((width, total), ROW))
    ends = _ends(rows, groups, total, a.device)
    out = torch.empty(groups, height, width, dtype=dtype, device=a.device)
    grid = triton.cdiv(width, EDGE), triton.cdiv(height, EDGE), groups
    if out.numel():
        _grouped[grid](
            *(a, a_inv, b, b_inv, ends, out, height, width, total),
            *(a.stride(0), *a_inv.stride(), b.stride(0), *b_inv.stride(), 0, 0, height * width),
            **_constants(groups, over_rows=True),
        )
    return out


def _constants(groups: int, *, over_rows: bool) -> dict[str, int]:
    sizes = {"GROUPS": groups, "GROUPS_BLOCK": triton.next_power_of_2(groups), "EDGE": EDGE}
    return sizes | {"OVER_ROWS": over_rows, "num_warps": WARPS, "num_stages": STAGES}


def _ends(rows: list[int], groups: int, total: int, device: torch.device) -> Tensor:
    """Where each group ends, (E,) int32."""
    if len(rows) != groups or sum(rows) != total or any(n % EDGE for n in rows):
        raise ValueError(
            f"rows: must be {groups} multiples of {EDGE} that add up to {total} (got {rows})"
        )
    ends = torch.tensor(rows).cumsum(0, dtype=torch.int32)
    # From pageable memory the copy would wait for all that the GPU has still to do.
    return ends.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else ends


def _check(
    name: str, codes: Tensor, shape: tuple[int, ...], inverse: Tensor, tiles: tuple[int, ...]
) -> None:
    """Codes of this shape, contiguous along the columns, with scales for them: the kernel follows
    raw pointers.

    Raises:
        ValueError: these are others.
    """
    if codes.shape != shape or codes.dtype != torch.float8_e4m3fn or codes.stride(-1) != 1:
        raise ValueError(
            f"{name}: must be {torch.float8_e4m3fn} of shape {shape} with contiguous rows (got "
            f"{codes.dtype} of shape {tuple(codes.shape)}, strides {codes.stride()})"
        )
    if inverse.shape != tiles or inverse.dtype != torch.float32 or inverse.device != codes.device:
        raise ValueError(
            f"scales of {name}: must be float32 of shape {tiles} on {codes.device} (got "
            f"{inverse.dtype} of shape {tuple(inverse.shape)} on {inverse.device})"
        )


@triton.jit
def _grouped(
    a, a_inv, b, b_inv, ends, out, rows, columns, inner,
    a_row, a_inv_row, a_inv_tile, b_row, b_inv_row, b_inv_tile, b_group, b_inv_group, out_group,
    GROUPS: tl.constexpr, GROUPS_BLOCK: tl.constexpr, EDGE: tl.constexpr, OVER_ROWS: tl.constexpr,
):  # fmt: skip
    """One program takes 128 x 128 numbers of a b^T. OVER_ROWS: of one group, over its part of
    `inner`, b in tiles; otherwise the rows are one group's, and b is its matrix, in blocks.
    """
    row = tl.program_id(1).to(tl.int64) * EDGE + tl.arange(0, EDGE)
    column = tl.program_id(0).to(tl.int64) * EDGE + tl.arange(0, EDGE)
    if OVER_ROWS:
        group = tl.program_id(2).to(tl.int64)
        first = tl.multiple_of(tl.load(ends + group - 1, group > 0, other=0), EDGE)
        last = tl.multiple_of(tl.load(ends + group), EDGE)
    else:
        other = tl.arange(0, GROUPS_BLOCK)
        end = tl.load(ends + other, other < GROUPS, other=2147483647)
        group = tl.sum((end <= tl.program_id(1) * EDGE).to(tl.int64), 0)
        first, last = 0, inner
    a += row[:, None] * a_row
    b += group * b_group + column[None, :] * b_row
    a_inv += row * a_inv_row
    b_inv += group * b_inv_group
    b_inv += column * b_inv_row if OVER_ROWS else tl.program_id(0) * b_inv_row
    total = tl.zeros([EDGE, EDGE], tl.float32)
    for start in range(first, last, EDGE):
        at, tile = start + tl.arange(0, EDGE), start // EDGE
        left = tl.load(a + at[None, :], (row < rows)[:, None] & (at < last)[None, :], other=0.0)
        inside = (at < last)[:, None] & (column < columns)[None, :]
        right = tl.load(b + at[:, None], inside, other=0.0)
        left_inv = tl.load(a_inv + tile * a_inv_tile, row < rows, other=0.0)
        if OVER_ROWS:
            right_inv = tl.load(b_inv + tile * b_inv_tile, column < columns, other=0.0)[None, :]
        else:
            right_inv = tl.load(b_inv + tile * b_inv_tile)
        total += tl.dot(left, right) * (left_inv[:, None] * right_inv)
    place = out + group * out_group + row[:, None] * columns + column[None, :]
    tl.store(place, total, (row < rows)[:, None] & (column < columns)[None, :])
