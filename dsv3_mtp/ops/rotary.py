"""Rotary embedding with interleaved pairs, and the sorting of MLA's projections into heads."""

from typing import Any

import torch
from torch import Tensor

from dsv3_mtp.ops import c, choice


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Rotates interleaved pairs (x_0, x_1), (x_2, x_3), ... as the released weights expect.

    Args:
        x: (B, T, H, P); angles: (2, T, P/2) or (2, B, T, P/2), cos and sin.
    """
    cos, sin = angles.unsqueeze(-2)  # (.., T, 1, P/2) each
    even, odd = x[..., 0::2], x[..., 1::2]
    turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
    return turned.flatten(-2).to(x.dtype)


def to_heads(
    query: Tensor, kv: Tensor, k_rope: Tensor, angles: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Rotates, and gives every head its own copy of the shared rotary key.

    Args:
        query: (B, T, H, nope+P); kv: (B, T, H, nope+v) keys and values; k_rope: (B, T, P).
        angles: (2, T, P/2) cos and sin.
    Returns:
        query, key (B, H, T, nope+P), value (B, H, T, v)
    """
    kernels = choice.kernels(query, kv, k_rope)
    if kernels is not None and kernels is not c:
        inputs = query.contiguous(), kv.contiguous(), evenly(k_rope), angles
        q, k, v = _ToHeads.apply(kernels, *inputs)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    rope = k_rope.shape[-1]
    nope = query.shape[-1] - rope
    q_nope, q_rope = query.split([nope, rope], dim=-1)
    k_nope, value = kv.split([nope, kv.shape[-1] - nope], dim=-1)
    k_rope = rotate(k_rope.unsqueeze(2), angles).expand(-1, -1, query.shape[2], -1)
    query = torch.cat([q_nope, rotate(q_rope, angles)], dim=-1)
    key = torch.cat([k_nope, k_rope], dim=-1)
    return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)


class _ToHeads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, kernels: Any, query: Tensor, kv: Tensor, k_rope: Tensor, angles: Tensor
    ) -> Any:
        ctx.save_for_backward(angles)
        ctx.kernels = kernels
        return kernels.to_heads(query, kv, k_rope, angles)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        parts = (grad.contiguous() for grad in grads)
        return None, *ctx.kernels.to_heads_backward(*parts, *ctx.saved_tensors), None


def evenly(x: Tensor) -> Tensor:
    """(B, T, P) with B*T rows equally far apart, as in a part of wider rows; else a copy."""
    return x if x.stride(2) == 1 and x.stride(0) == x.shape[1] * x.stride(1) else x.contiguous()
