"""Real FP8 products by torch alone: cuBLAS block scaling through torch.nn.functional.scaled_mm.
Hopper only.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv3_mtp.precision.linear import Blocks, Product
from dsv3_mtp.precision.quantise import BLOCK, EDGE, ROW, Scale, Tile, no_kernel, quantise

ALIGN = 16  # cuBLAS wants every dimension to be a multiple of this


@dataclass(frozen=True)
class ScaledMM(Product):
    """product(a, b) = a b^T on FP8 tensor cores, accumulated in float32. Same numbers as
    `emulate.Emulated`.

    The products of all groups are one launch (triton_grouped.py): F.scaled_grouped_mm of torch 2.13
    takes scales per row and MXFP8, not V3's blocks. The sides of their weights are multiples of 16.
    """

    scale: Scale = "pow2"
    multiple = EDGE

    def __call__(self, a: Tensor, a_tile: Tile, b: Tensor | Blocks, b_tile: Tile) -> Tensor:
        """a: (M, K) in 1 x 128 tiles, b: (N, K) in either, quantised along K -> (M, N) in the type
        of `a`.
        """
        rows, columns = a.shape[0], len(b.codes if isinstance(b, Blocks) else b)
        if 0 in (rows, columns, a.shape[1]):
            return a.new_zeros(rows, columns)
        a_codes, a_inv = _quantise(_aligned(a), a_tile, self.scale)
        # The sides of a weight that is in blocks already are aligned (convert.py: `unsuited`).
        aligned = b if isinstance(b, Blocks) else _quantise(_aligned(b), b_tile, self.scale)
        b_codes, b_inv = aligned
        scales = _layout(a_inv, a_tile), _recipe(a_tile), _layout(b_inv, b_tile), _recipe(b_tile)
        product = F.scaled_mm(a_codes, b_codes.t(), *scales, output_dtype=a.dtype)
        return product[:rows, :columns]

    def grouped(self, x: Tensor, tile: Tile, weight: Tensor | Blocks, rows: list[int]) -> Tensor:
        from dsv3_mtp.precision import triton_grouped

        assert tile == ROW, "no product takes blocks and blocks"
        codes = _quantise(x, ROW, self.scale)
        if isinstance(weight, Tensor):
            weight = Blocks(*_quantise_matrices(weight, self.scale))
        return triton_grouped.by_rows(*codes, *weight, rows, x.dtype)

    def grouped_over_rows(self, a: Tensor, b: Tensor, rows: list[int]) -> Tensor:
        from dsv3_mtp.precision import triton_grouped

        left, right = (_quantise(x.t(), ROW, self.scale) for x in (a, b))
        return triton_grouped.over_rows(*left, *right, rows, a.dtype)


def _quantise(x: Tensor, tile: Tile, scale: Scale) -> tuple[Tensor, Tensor]:
    """`quantise` with codes in row-major order, in which the Triton kernel writes them anyway."""
    codes, scale_inv = quantise(x, tile, scale)
    return codes.contiguous(), scale_inv


def _quantise_matrices(weight: Tensor, scale: Scale) -> tuple[Tensor, Tensor]:
    """Codes (E, N, K), rows contiguous, and scales (E, N/128, K/128) of the matrices of weight (E,
    N, K): in one call if no block is in two of them.
    """
    groups, rows, columns = weight.shape
    if weight.is_contiguous() and rows % EDGE == 0:
        codes, scale_inv = _quantise(weight.flatten(0, 1), BLOCK, scale)  # (E*N, K)
        return codes.unflatten(0, (groups, -1)), scale_inv.unflatten(0, (groups, -1))
    # the transposed weights of dx = dy W
    if weight.transpose(1, 2).is_contiguous() and columns % EDGE == 0:
        # (N, E*K)
        codes, scale_inv = _quantise(weight.transpose(1, 2).flatten(0, 1).t(), BLOCK, scale)
        codes, scale_inv = codes.unflatten(1, (groups, -1)), scale_inv.unflatten(1, (groups, -1))
        return codes.transpose(0, 1), scale_inv.transpose(0, 1)
    each = [_quantise(matrix, BLOCK, scale) for matrix in weight]
    return torch.stack([codes for codes, _ in each]), torch.stack([inverse for _, inverse in each])


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
