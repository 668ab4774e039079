"""Block quantisation to FP8 (E4M3), bit for bit as Transformer Engine's Float8BlockScaling does it.

    activations and gradients: one scale per 1 x 128 tile, along the dimension that is contracted
        (V3 section 3.3.2)
    weights:                   one scale per 128 x 128 tile

codes = round(x * scale), x ~ codes * scale_inv. A partial tile at the edge is a tile like the
others. Checkpoints in FP8, as DeepSeek-V3 releases them, store codes and scale_inv of BLOCK tiles,
quantised by the rule "stored".
"""

import functools
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv3_mtp.ops import choice

# pow2: the largest power of two with amax * scale <= 448. fp32: 448 / amax. stored: the largest
# power of two with amax * scale <= 464, the last number that still rounds to 448: the largest code
# of every tile is then at least 240, and quantising what was dequantised gives the same codes and
# scales.
Scale = Literal["pow2", "fp32", "stored"]
Tile = tuple[int, int]
EDGE = 128
ROW: Tile = (1, EDGE)
BLOCK: Tile = (EDGE, EDGE)
LARGEST = 448.0  # of E4M3
ROUNDS_TO_LARGEST = 464.0


def scale_shape(shape: tuple[int, ...], tile: Tile = BLOCK) -> tuple[int, ...]:
    """Tiles of a (rows, columns) matrix, partial ones at the right and lower edge included."""
    return tuple(-(-size // edge) for size, edge in zip(shape, tile, strict=True))


def quantise(x: Tensor, tile: Tile, scale: Scale = "pow2") -> tuple[Tensor, Tensor]:
    """(M, K) -> codes (M, K) float8_e4m3fn and scale_inv (M / tile rows, K / tile columns) float32,
    rounded up.
    """
    if x.is_cuda and scale != "stored" and choice.kernels(x) is not None and no_kernel() is None:
        from dsv3_mtp.precision import triton_quantise

        return triton_quantise.quantise(x, tile, scale)
    return by_operations(x, tile, scale)


@functools.cache
def no_kernel() -> str | None:
    """Why torch's operations quantise on a GPU, None if the Triton kernel does."""
    try:
        from dsv3_mtp.precision import triton_quantise

        triton_quantise.quantise(torch.zeros(1, 1, device="cuda"), ROW, "pow2")
    except (
        Exception
    ) as error:  # no Triton, no C compiler for its launchers, or a GPU that has no E4M3
        return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
    return None


def by_operations(x: Tensor, tile: Tile, scale: Scale) -> tuple[Tensor, Tensor]:
    """`quantise` on any device."""
    tiles = _tiled(x, tile)  # (M/a, a, K/128, 128)
    factor = scales(tiles.abs().amax((1, 3)), x.dtype, scale)  # (M/a, K/128)
    codes = (
        (tiles.float() * factor[:, None, :, None]).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
    )
    return codes.flatten(0, 1).flatten(1)[: x.shape[0], : x.shape[1]], factor.reciprocal()


def dequantise(
    codes: Tensor, scale_inv: Tensor, tile: Tile, dtype: torch.dtype = torch.float32
) -> Tensor:
    """codes * scale_inv, (M, K). With scales that are powers of two it is exact in bfloat16 too."""
    if codes.device.type == "cpu":  # three times as fast as .float()
        table = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
        numbers = codes.contiguous().view(torch.uint8).int().flatten()
        wide = table.index_select(0, numbers).view(codes.shape)
    else:
        wide = codes.float()
    tiles = _tiled(wide, tile)  # of whole tiles a view: no second matrix
    tiles = tiles.mul_(scale_inv.float()[:, None, :, None])
    return tiles.flatten(0, 1).flatten(1)[: codes.shape[0], : codes.shape[1]].to(dtype)


def scales(amax: Tensor, dtype: torch.dtype, scale: Scale) -> Tensor:
    """448 / amax, of `stored` 464 / amax. `pow2` and `stored` cut the mantissa off, which leaves
    the largest power of two that is not above it.

    A tile of zeros, or with an infinity or a nan in it, has scale 1. Where 448 / amax overflows,
    the largest number of `dtype` (that of the tensor to quantise) takes its place.
    """
    amax = amax.float()
    # `448.0 / amax` would multiply with the reciprocal: 1 ulp off
    largest = ROUNDS_TO_LARGEST if scale == "stored" else LARGEST
    factor = torch.full_like(amax, largest) / amax
    factor = torch.where(factor.isinf(), torch.finfo(dtype).max, factor)
    if scale != "fp32":
        factor = (factor.view(torch.int32) & -0x800000).view(torch.float32)
    return torch.where((amax == 0) | ~amax.isfinite(), 1.0, factor)


def _tiled(x: Tensor, tile: Tile) -> Tensor:
    missing = [-size % edge for size, edge in zip(x.shape, tile, strict=True)]
    padded = F.pad(x, (0, missing[1], 0, missing[0])) if any(missing) else x
    return padded.unflatten(1, (-1, tile[1])).unflatten(0, (-1, tile[0]))
