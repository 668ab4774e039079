"""MLA's attention in training: from projected queries, keys and values to the mixed values.

A core is the part with the softmax: core(query, key, value, scale, first) of tensors (B, H, T, qk),
(B, H, T, qk), (B, H, T, v) returns (B, H, T, v). Slot i attends to the slots first[i] .. i of its
row; `first` (B, T) int64 is the slot where its document begins, None stands for 0 everywhere.
Nothing here ever holds T^2 numbers.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dsv3_mtp.ops import c, choice
from dsv3_mtp.ops.recompute import recomputed
from dsv3_mtp.ops.rotary import evenly, to_heads

Core = Callable[[Tensor, Tensor, Tensor, float, Tensor | None], Tensor]

BLOCK = 512  # queries that are compared with all keys at a time, under documents

# flash may come first in torch's own order; it rejects unequal widths, and the next in that order
# has a slow backward.
CAUSAL = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
# Never cuDNN: under a mask its backward gives nan for queries where T % 128 == 64 (pytorch#196678).
MASKED = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def attend(
    query: Tensor,
    kv: Tensor,
    k_rope: Tensor,
    angles: Tensor,
    scale: float,
    first: Tensor | None = None,
    *,
    core: Core | None = None,
) -> Tensor:
    """Rotates, then softmax(q k^T * scale) v.

    Args:
        query: (B, T, H, nope+P); kv: (B, T, H, nope+v) keys and values; k_rope: (B, T, P), shared
            by the heads.
        angles: (2, T, P/2) cos and sin.
        first: (B, T) int64, see above.
        core: what mixes; None: C on a CPU where it is, else torch's.
    Returns:
        (B, T, H*v)
    """
    if core is None and choice.kernels(query, kv, k_rope) is c:
        inputs = query.contiguous(), kv.contiguous(), evenly(k_rope)
        return _Attention.apply(*inputs, angles, first, scale)
    query, key, value = recomputed(to_heads, query, kv, k_rope, angles)
    mixed = (core or sdpa)(query, key, value, scale, first)  # (B, H, T, v)
    return mixed.transpose(1, 2).flatten(2)


class _Attention(torch.autograd.Function):
    """In C: torch's CPU flash kernel wants values as wide as keys and pays for padding them; its
    math path computes the upper triangle as well, and both need rotated copies of the heads.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        kv: Tensor,
        k_rope: Tensor,
        angles: Tensor,
        first: Tensor | None,
        scale: float,
    ) -> Tensor:
        angles = angles.contiguous()
        out, softmax = c.attention(query, kv, k_rope, angles, first, scale)
        ctx.save_for_backward(query, kv, k_rope, angles, first, softmax)
        ctx.scale = scale
        return out.flatten(2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        query, kv, k_rope, angles, first, softmax = ctx.saved_tensors
        grad = grad.contiguous().view(*query.shape[:3], -1)
        inputs = query, kv, k_rope, angles, first
        grads = c.attention_backward(grad, *inputs, softmax, ctx.scale)
        return *grads, None, None, None


def sdpa(query: Tensor, key: Tensor, value: Tensor, scale: float, first: Tensor | None) -> Tensor:
    """The core of torch's kernels."""
    if first is None:
        return _sdpa(query, key, value, scale, None)
    if query.shape[2] <= BLOCK:
        return _sdpa(query, key, value, scale, _mask(first, 0, 0, query.shape[2]))
    return _Blocks.apply(query, key, value, scale, first)


def _sdpa(query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    """On CUDA in the order that suits unequal widths; the CPU's flash kernel insists on equal ones
    and torch would silently take its T^2-memory math path otherwise, so there the narrower value is
    padded with zeros.
    """
    attention = partial(
        F.scaled_dot_product_attention, attn_mask=mask, is_causal=mask is None, scale=scale
    )
    width = value.shape[-1]
    if query.is_cuda:
        with sdpa_kernel(CAUSAL if mask is None else MASKED, set_priority=True):
            return attention(query, key, value)
    if width < query.shape[-1]:
        value = F.pad(value, (0, query.shape[-1] - width))
    return attention(query, key, value)[..., :width]


def _mask(first: Tensor, begin: int, start: int, end: int) -> Tensor:
    """(B, 1, end - start, end - begin) bool: which of the keys begin .. end queries attend to."""
    slot = torch.arange(begin, end, device=first.device)
    seen = slot <= slot[start - begin :, None]  # (queries, keys)
    return (seen & (slot >= first[:, start:end, None])).unsqueeze(1)


class _Blocks(torch.autograd.Function):
    """Attention under `first` by blocks of queries, each with a mask of BLOCK * T numbers. The
    backward makes the masks anew instead of keeping them.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float, first: Tensor
    ) -> Tensor:
        ctx.save_for_backward(query, key, value, first)
        ctx.scale = scale
        mixed = []
        for begin, start, end in _blocks(first):
            q, k, v = query[:, :, start:end], key[:, :, begin:end], value[:, :, begin:end]
            mixed.append(_sdpa(q, k, v, scale, _mask(first, begin, start, end)))
        return torch.cat(mixed, dim=2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        query, key, value, first = ctx.saved_tensors
        wide = torch.promote_types(query.dtype, torch.float32)
        grad_query = torch.empty_like(query)
        grad_key, grad_value = (torch.zeros_like(x, dtype=wide) for x in (key, value))
        for begin, start, end in _blocks(first):
            parts = query[:, :, start:end], key[:, :, begin:end], value[:, :, begin:end]
            q, k, v = (part.detach().requires_grad_() for part in parts)
            with torch.enable_grad():
                out = _sdpa(q, k, v, ctx.scale, _mask(first, begin, start, end))
            grads = torch.autograd.grad(out, (q, k, v), grad[:, :, start:end])
            grad_query[:, :, start:end] = grads[0]
            grad_key[:, :, begin:end] += grads[1]
            grad_value[:, :, begin:end] += grads[2]
        return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype), None, None


def _blocks(first: Tensor) -> list[tuple[int, int, int]]:
    """Of each block of queries start .. end the first key that one of them attends to, start, end.

    On a GPU that key is 0: the host would wait for another.
    """
    blocks, length = [], first.shape[1]
    for start in range(0, length, BLOCK):
        end = min(start + BLOCK, length)
        begin = 0 if first.is_cuda else int(first[:, start:end].min())
        blocks.append((begin, start, end))
    return blocks
