"""FP8 products on any device: both operands go through the quantiser, the product itself is
computed in high precision.

What tensor cores compute differs from this by the order of a float32 sum, about 1e-7, and by the
precision of their accumulator, which `accumulation` can imitate (V3 section 3.3.2).
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dsv3_mtp.precision.linear import Blocks, Product
from dsv3_mtp.precision.quantise import Scale, Tile, dequantise, quantise

Accumulation = Literal["fp32", "fp22", "fp22_promote128"]
STEP = 32  # columns that one tensor-core instruction of Hopper sums (WGMMA on 8-bit operands)
PROMOTE = 128  # columns after which V3 adds the partial sum to a float32 register: N_C


@dataclass(frozen=True)
class Emulated(Product):
    """product(a, b) = a b^T of tensors rounded to FP8."""

    scale: Scale = "pow2"
    accumulation: Accumulation = "fp32"

    def __call__(self, a: Tensor, a_tile: Tile, b: Tensor | Blocks, b_tile: Tile) -> Tensor:
        """a: (M, K), b: (N, K), each quantised along K -> (M, N) in the type of `a`."""
        codes, scale_inv = b if isinstance(b, Blocks) else quantise(b, b_tile, self.scale)
        exact = self.scale == "pow2" and self.accumulation == "fp32" and a.dtype == torch.bfloat16
        exact = exact and bool((scale_inv.frexp().mantissa == 0.5).all())  # those on disk are any
        dtype = torch.bfloat16 if exact else torch.float32
        a8 = dequantise(*quantise(a, a_tile, self.scale), a_tile, dtype)
        b8 = dequantise(codes, scale_inv, b_tile, dtype)
        out = a8 @ b8.T if self.accumulation == "fp32" else accumulate(a8, b8, self.accumulation)
        return out.to(a.dtype)


def accumulate(a: Tensor, b: Tensor, accumulation: Accumulation) -> Tensor:
    """a b^T with an accumulator of 14 significant bits, cut off after every 32 columns;
    `fp22_promote128` moves the sum into float32 every 128 columns, as V3 does. a: (M, K), b: (N,
    K), float32.
    """
    total = a.new_zeros(a.shape[0], b.shape[0])
    partial = torch.zeros_like(total)
    for start in range(0, a.shape[1], STEP):
        columns = slice(start, start + STEP)
        partial = (partial + a[:, columns] @ b[:, columns].T).contiguous()
        # 13 of the 23 fraction bits
        partial = (partial.view(torch.int32) & ~0x3FF).view(torch.float32)
        if accumulation == "fp22_promote128" and (start + STEP) % PROMOTE == 0:
            total += partial
            partial = torch.zeros_like(total)
    return total + partial
