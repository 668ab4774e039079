"""Block-FP8 weights as DeepSeek-V3 releases them: E4M3 codes, one float32 `weight_scale_inv` per
128 x 128 block.

weight = code * scale_inv. Scales are powers of two here (Transformer Engine's default and
DeepSeek-V3.1's ue8m0), so that code * scale is exact in bfloat16 and quantising it again gives the
same codes and scales.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 128
LARGEST = 448.0  # of E4M3
# The scale is the smallest power of two with amax / scale <= 464. What lies above 448 still rounds
# to 448, and the largest code of every block is at least 240: quantising again cannot choose a
# smaller scale.
ROUNDS_TO_LARGEST = 464.0


def scale_shape(shape: tuple[int, ...], block: tuple[int, int] = (BLOCK, BLOCK)) -> tuple[int, ...]:
    """Blocks of a (rows, columns) matrix, partial ones at the right and lower edge included."""
    return tuple(-(-size // edge) for size, edge in zip(shape, block, strict=True))


def quantise(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(rows, columns), finite -> codes float8_e4m3fn (rows, columns), scale_inv float32, one per
    block.
    """
    wide = weight.float()
    rows, columns = scale_shape(tuple(wide.shape))
    padded = F.pad(wide, (0, columns * BLOCK - wide.shape[1], 0, rows * BLOCK - wide.shape[0]))
    blocks = padded.view(rows, BLOCK, columns, BLOCK)
    amax = blocks.abs().amax((1, 3))  # (block rows, block columns)
    amax = torch.where(amax < 2.0**-100, ROUNDS_TO_LARGEST, amax)  # nothing but zeros: scale 1
    mantissa, exponent = torch.frexp(amax / ROUNDS_TO_LARGEST)
    # amax / 464 = mantissa * 2^exponent with mantissa in [0.5, 1)
    exponent = exponent - (mantissa == 0.5).int()
    scale = torch.ldexp(torch.ones_like(mantissa), exponent)
    codes = (blocks / scale[:, None, :, None]).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
    return codes.view_as(padded)[: wide.shape[0], : wide.shape[1]].contiguous(), scale


def dequantise(
    codes: Tensor, scale_inv: Tensor, *, block: tuple[int, int] = (BLOCK, BLOCK)
) -> Tensor:
    """codes (rows, columns), scale_inv (blocks of rows, blocks of columns) -> float32 (rows,
    columns).
    """
    # three times as fast as .float()
    table = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    out = table.index_select(0, codes.view(torch.uint8).int().flatten()).view(codes.shape)
    # a band of blocks at a time: no second full matrix
    for number, scales in enumerate(scale_inv.float()):
        band = slice(number * block[0], (number + 1) * block[0])
        out[band] *= scales.repeat_interleave(block[1])[: out.shape[1]]
    return out
