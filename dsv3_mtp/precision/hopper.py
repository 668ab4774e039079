"""Real FP8 products by torch alone: cuBLAS block scaling through torch.nn.functional.scaled_mm.
Hopper only.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv3_mtp.precision.linear import Product
from dsv3_mtp.precision.quantise import BLOCK, EDGE, ROW, Scale, Tile, no_kernel, quantise

ALIGN = 16  # cuBLAS wants every dimension to be a multiple of this


@dataclass(frozen=True)
class ScaledMM(Product):
    """product(a, b) = a b^T on FP8 tensor cores, accumulated in float32. Same numbers as
    `emulate.Emulated`.

    Groups share one call of the quantiser per operand. Their products are one call each:
    F.scaled_grouped_mm of torch 2.13 takes scales per row and MXFP8, not V3's blocks. The sides of
    their weights are multiples of 16.
    """

    scale: Scale = "pow2"
    multiple = EDGE

    def __call__(self, a: Tensor, a_tile: Tile, b: Tensor, b_tile: Tile) -> Tensor:
        """a: (M, K) in 1 x 128 tiles, b: (N, K) in either, quantised along K -> (M, N) in the type
        of `a`.
        """
        rows, columns = a.shape[0], b.shape[0]
        if 0 in (rows, columns, a.shape[1]):
            return a.new_zeros(rows, columns)
        (a_codes, a_inv), (b_codes, b_inv) = (
            _quantise(_aligned(x), t, self.scale) for x, t in ((a, a_tile), (b, b_tile))
        )
        scales = _layout(a_inv, a_tile), _layout(b_inv, b_tile)
        return _multiply(a_codes, scales[0], b_codes, scales[1], b_tile, a.dtype)[:rows, :columns]

    def grouped(self, x: Tensor, tile: Tile, weight: Tensor, rows: list[int]) -> Tensor:
        assert tile == ROW, "cuBLAS does not multiply blocks by blocks"
        if not len(x):
            return x.new_empty(0, weight.shape[1])
        codes, scale_inv = _quantise(x, ROW, self.scale)  # (M, K), (M, K/128)
        tiles = scale_inv.shape[1]
        scales = _by_group(scale_inv, *_groups_of_blocks(rows, x.device)).split(
            [n * tiles for n in rows]
        )
        matrices = _quantise_matrices(weight, self.scale)
        parts = zip(codes.split(rows), scales, matrices, strict=True)
        return torch.cat(
            [
                _multiply(part, inverse.view(tiles, -1).t(), matrix, blocks, BLOCK, x.dtype)
                for part, inverse, (matrix, blocks) in parts
                if len(part)
            ]
        )

    def grouped_over_rows(self, a: Tensor, b: Tensor, rows: list[int]) -> Tensor:
        if not len(a):
            return a.new_zeros(len(rows), a.shape[1], b.shape[1])
        parts: list[tuple[Tensor, ...]] = []
        for x in (a, b):
            # (N, M), (N, M/128): each group is a part of columns
            codes, scale_inv = _quantise(x.t(), ROW, self.scale)
            tiles = [n // EDGE for n in rows]
            parts += [codes.split(rows, 1), _layout(scale_inv, ROW).split(tiles, 1)]
        return torch.stack(
            [
                _multiply(left, left_inv, right, right_inv, ROW, a.dtype)
                if left.shape[1]
                else a.new_zeros(a.shape[1], b.shape[1])
                for left, left_inv, right, right_inv in zip(*parts, strict=True)
            ]
        )


def _multiply(
    a: Tensor, a_inv: Tensor, b: Tensor, b_inv: Tensor, b_tile: Tile, dtype: torch.dtype
) -> Tensor:
    """a b^T (M, N) of codes a (M, K) in 1 x 128 tiles and b (N, K)."""
    recipes = _recipe(ROW), _recipe(b_tile)
    return F.scaled_mm(a, b.t(), a_inv, recipes[0], b_inv, recipes[1], output_dtype=dtype)


def _quantise(x: Tensor, tile: Tile, scale: Scale) -> tuple[Tensor, Tensor]:
    """`quantise` with codes in row-major order, in which the Triton kernel writes them anyway."""
    codes, scale_inv = quantise(x, tile, scale)
    return codes.contiguous(), scale_inv


def _quantise_matrices(weight: Tensor, scale: Scale) -> list[tuple[Tensor, Tensor]]:
    """Codes (N, K) and laid-out scales of each matrix of weight (E, N, K), in one call if no block
    is in two.
    """
    groups, rows, columns = weight.shape
    parts: list[Tensor] | tuple[Tensor, ...]
    if weight.is_contiguous() and rows % EDGE == 0:
        codes, scale_inv = _quantise(weight.flatten(0, 1), BLOCK, scale)  # (E*N, K)
        # (E, N/128, K/128)
        parts, scale_inv = codes.split(rows), scale_inv.unflatten(0, (groups, -1))
    # the transposed weights of dx = dy W
    elif weight.transpose(1, 2).is_contiguous() and columns % EDGE == 0:
        # (N, E*K)
        codes, scale_inv = _quantise(weight.transpose(1, 2).flatten(0, 1).t(), BLOCK, scale)
        parts, scale_inv = (
            codes.split(columns, 1),
            scale_inv.unflatten(1, (groups, -1)).transpose(0, 1),
        )
    else:
        each = [_quantise(matrix, BLOCK, scale) for matrix in weight]
        parts, scale_inv = (
            [codes for codes, _ in each],
            torch.stack([inverse for _, inverse in each]),
        )
    return list(zip(parts, _layout(scale_inv, BLOCK), strict=True))


def _groups_of_blocks(rows: list[int], device: torch.device) -> Tensor:
    """First row and rows of the group that each block of 128 rows belongs to, (2, M/128) int64."""
    sizes = torch.tensor(rows)
    table = torch.stack([sizes.cumsum(0) - sizes, sizes]).repeat_interleave(sizes // EDGE, dim=1)
    # From pageable memory the copy would wait for all that the GPU has still to do.
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table


def _by_group(scale_inv: Tensor, first: Tensor, size: Tensor) -> Tensor:
    """Scales (M, T) of tiles -> (M*T,): group after group, each column-major as cuBLAS wants it.

    first, size: (M/128,) from `_groups_of_blocks`.
    """
    rows, tiles = scale_inv.shape
    place = torch.arange(rows * tiles, device=scale_inv.device)
    block = place // (tiles * EDGE)
    start, height = first[block], size[block]
    place = place - start * tiles  # within the group
    return scale_inv[start + place % height, place // height]


def _aligned(x: Tensor) -> Tensor:
    missing = [-size % ALIGN for size in x.shape]
    # a pad of nothing would be a copy
    return F.pad(x, (0, missing[1], 0, missing[0])) if any(missing) else x


def _recipe(tile: Tile) -> F.ScalingType:
    return F.ScalingType.BlockWise1x128 if tile == ROW else F.ScalingType.BlockWise128x128


def _layout(scale_inv: Tensor, tile: Tile) -> Tensor:
    """As cuBLAS wants it, column-major: (M, K/128) of tiles, (.., K/128 padded to 4, N/128) of
    blocks (.., N, K).
    """
    if tile == ROW:
        return scale_inv.t().contiguous().t()
    return F.pad(scale_inv, (0, -scale_inv.shape[-1] % 4)).contiguous().transpose(-2, -1)


def unsupported(device: torch.device) -> str | None:
    """Why this backend cannot run here, None if it can."""
    if device.type != "cuda":
        return "needs a Hopper GPU; there is no CUDA device"
    capability = torch.cuda.get_device_capability(device)
    if capability[0] != 9:
        return (
            "needs a Hopper GPU (compute capability 9.x); "
            f"this one has {capability[0]}.{capability[1]}"
        )
    cuda = tuple(int(part) for part in str(torch.version.cuda).split(".")[:2])
    if cuda < (12, 9) or not hasattr(F, "scaled_mm"):
        return (
            "needs torch >= 2.11 built for CUDA >= 12.9; this is "
            f"torch {torch.__version__}, CUDA {torch.version.cuda}"
        )
    reason = no_kernel()
    return (
        None
        if reason is None
        else f"needs Triton for its quantiser, which does not run here ({reason})"
    )
