"""Real FP8 products by torch alone: cuBLAS block scaling through torch.nn.functional.scaled_mm. Hopper only."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv3_mtp.precision.quantise import ROW, Scale, Tile, quantise

ALIGN = 16  # cuBLAS wants every dimension to be a multiple of this


@dataclass(frozen=True)
class ScaledMM:
    """product(a, b) = a b^T on FP8 tensor cores, accumulated in float32. Same numbers as `emulate.Emulated`."""

    scale: Scale = "pow2"

    def __call__(self, a: Tensor, a_tile: Tile, b: Tensor, b_tile: Tile) -> Tensor:
        """a: (M, K) in 1 x 128 tiles, b: (N, K) in either, quantised along K -> (M, N) in the type of `a`."""
        rows, columns = a.shape[0], b.shape[0]
        if 0 in (rows, columns, a.shape[1]):  # an expert without tokens
            return a.new_zeros(rows, columns)
        (a_codes, a_inv), (b_codes, b_inv) = (
            quantise(_aligned(x), t, self.scale) for x, t in ((a, a_tile), (b, b_tile))
        )
        out = F.scaled_mm(
            a_codes.contiguous(),
            b_codes.contiguous().t(),
            *(_layout(a_inv, a_tile), _recipe(a_tile), _layout(b_inv, b_tile), _recipe(b_tile)),
            output_dtype=a.dtype,
        )
        return out[:rows, :columns]


def _aligned(x: Tensor) -> Tensor:
    return F.pad(x, (0, -x.shape[1] % ALIGN, 0, -x.shape[0] % ALIGN))


def _recipe(tile: Tile) -> F.ScalingType:
    return F.ScalingType.BlockWise1x128 if tile == ROW else F.ScalingType.BlockWise128x128


def _layout(scale_inv: Tensor, tile: Tile) -> Tensor:
    """The strides that cuBLAS expects: (M, K/128) of tiles and (K/128 padded to 4, N/128) of blocks, column-major."""
    if tile == ROW:
        return scale_inv.t().contiguous().t()
    return F.pad(scale_inv, (0, -scale_inv.shape[1] % 4)).contiguous().t()


def unsupported(device: torch.device) -> str | None:
    """Why this backend cannot run here, None if it can."""
    if device.type != "cuda":
        return "needs a Hopper GPU; there is no CUDA device"
    capability = torch.cuda.get_device_capability(device)
    if capability[0] != 9:
        return f"needs a Hopper GPU (compute capability 9.x); this one has {capability[0]}.{capability[1]}"
    cuda = tuple(int(part) for part in str(torch.version.cuda).split(".")[:2])
    if cuda < (12, 9) or not hasattr(F, "scaled_mm"):
        return (
            f"needs torch >= 2.11 built for CUDA >= 12.9; this is torch {torch.__version__}, CUDA {torch.version.cuda}"
        )
    return None
