"""Causal attention on a CPU by one C kernel (attention.c).

torch's CPU flash kernel wants values as wide as keys and pays for padding them; its math path
computes the upper triangle as well, and both need rotated copies of the heads. Nothing of size T^2
is kept.
"""

import torch
from torch import Tensor

from dsv3_mtp.ops import kernels


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query: Tensor, kv: Tensor, k_rope: Tensor, angles: Tensor, scale: float):
        out, softmax = kernels.attention(query, kv, k_rope, angles, scale)
        ctx.save_for_backward(query, kv, k_rope, angles, softmax)
        ctx.scale = scale
        return out.flatten(2)

    @staticmethod
    def backward(ctx, grad: Tensor):
        query, kv, k_rope, angles, softmax = ctx.saved_tensors
        grads = kernels.attention_backward(
            grad.contiguous(), query, kv, k_rope, angles, softmax, ctx.scale
        )
        return *grads, None, None


def causal_attention(
    query: Tensor, kv: Tensor, k_rope: Tensor, angles: Tensor, scale: float
) -> Tensor:
    """Rotates, then softmax(q k^T * scale) v with slot i attending to slots 0..i.

    Args:
        query: (B, T, H, nope+P); kv: (B, T, H, nope+v) keys and values; k_rope: (B, T, P), shared
            by the heads.
        angles: (2, T, P/2) cos and sin.
    Returns:
        (B, T, H*v)
    """
    return _CausalAttention.apply(
        query.contiguous(), kv.contiguous(), evenly(k_rope), angles, scale
    )


def evenly(x: Tensor) -> Tensor:
    """(B, T, P) with its B*T rows equally far apart, as they are in a part of wider rows; else a
    copy.
    """
    return x if x.stride(2) == 1 and x.stride(0) == x.shape[1] * x.stride(1) else x.contiguous()
