"""Causal attention on a CPU for short sequences: plain batched products, block by block below the diagonal.

torch's CPU flash kernel wants values as wide as keys and pays for padding them; its math path computes the upper
triangle as well. Probabilities are kept for the backward, T^2 / 2 numbers per head, so this is for short sequences.
"""

import torch
from torch import Tensor

from dsv3_mtp import kernels
from dsv3_mtp.model.recompute import again

BLOCK = 128  # queries per block: of T^2 scores (T + BLOCK) / 2T are computed
LONGEST = 1024  # tokens; probabilities of one head and layer then take 2.2 MiB


def usable(query: Tensor, mask: Tensor | None) -> bool:
    """query: (B, T, ..)."""
    return mask is None and query.shape[1] <= LONGEST and kernels.usable(query)


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query: Tensor, kv: Tensor, k_rope: Tensor, angles: Tensor, scale: float):
        batch, length, heads, width = query.shape
        value = kv.shape[-1] - (width - k_rope.shape[-1])
        out = query.new_empty(batch, heads, length, value)
        q, k, v, mixed = (x.flatten(0, 1) for x in (*again(to_heads, query, kv, k_rope, angles), out))  # (B*H, T, .)
        probs = []
        for rows in blocks(length):
            scores = torch.bmm(q[:, rows], k[:, : rows.stop].transpose(1, 2))
            probs.append(kernels.causal_softmax_(scores, rows.start, scale))
            mixed[:, rows] = torch.bmm(scores, v[:, : rows.stop])
        ctx.save_for_backward(q, k, v, angles, *probs)
        ctx.scale, ctx.shapes = scale, (query.shape, kv.shape, k_rope.shape)
        return out.transpose(1, 2).flatten(2)

    @staticmethod
    def backward(ctx, grad: Tensor):
        q, k, v, angles, *probs = ctx.saved_tensors
        (batch, length, heads, _), *_ = ctx.shapes
        grad = grad.view(batch, length, heads, -1).transpose(1, 2).flatten(0, 1)  # (B*H, T, v)
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for rows, p in zip(blocks(length), probs, strict=True):
            seen = slice(0, rows.stop)
            scores = torch.bmm(grad[:, rows], v[:, seen].transpose(1, 2))  # of the probabilities first
            kernels.causal_softmax_backward_(scores, p, rows.start, ctx.scale)
            grad_v[:, seen].baddbmm_(p.transpose(1, 2), grad[:, rows])
            grad_q[:, rows] = torch.bmm(scores, k[:, seen])
            grad_k[:, seen].baddbmm_(scores.transpose(1, 2), q[:, rows])
        grads = [grad.new_empty(shape) for shape in ctx.shapes]  # query, kv, k_rope
        parts = [x.unflatten(0, (batch, heads)) for x in (grad_q, grad_k, grad_v)]
        kernels.heads(grads, angles, parts, back=True)
        return *grads, None, None


def to_heads(query: Tensor, kv: Tensor, k_rope: Tensor, angles: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rotates: what `causal_attention` is given -> q, k (B, H, T, nope+P), v (B, H, T, v)."""
    batch, length, heads, width = query.shape
    q, k = query.new_empty(2, batch, heads, length, width)
    v = query.new_empty(batch, heads, length, kv.shape[-1] - (width - k_rope.shape[-1]))
    kernels.heads([query, kv, k_rope], angles, [q, k, v], back=False)
    return q, k, v


def blocks(length: int) -> list[slice]:
    return [slice(start, min(start + BLOCK, length)) for start in range(0, length, BLOCK)]


def causal_attention(query: Tensor, kv: Tensor, k_rope: Tensor, angles: Tensor, scale: float) -> Tensor:
    """Rotates, then softmax(q k^T * scale) v with slot i attending to slots 0..i.

    Args:
        query: (B, T, H, nope+P); kv: (B, T, H, nope+v) keys and values; k_rope: (B, T, P), shared by the heads.
        angles: (2, T, P/2) cos and sin.
    Returns:
        (B, T, H*v)
    """
    return _CausalAttention.apply(query.contiguous(), kv.contiguous(), k_rope, angles, scale)
