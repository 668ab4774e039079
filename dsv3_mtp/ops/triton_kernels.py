"""Triton kernels for the passes between the matrix products of a training step on a GPU, behind
checked calls: the counterpart of c.py.

Each reads its inputs once (the loss twice) and computes in float32. choice.py says when they are
used. Every function wants tensors that are contiguous unless it says otherwise.
"""

from typing import Any

import torch
import triton
from torch import Tensor

from dsv3_mtp.ops.triton_jit import (
    _cross_entropy,
    _sum_rows,
    _swiglu,
    _swiglu_backward,
    _to_heads,
    _to_heads_backward,
)
from dsv3_mtp.ops.triton_norm import add_rms_norm as add_rms_norm
from dsv3_mtp.ops.triton_norm import add_rms_norm_backward as add_rms_norm_backward
from dsv3_mtp.ops.triton_router import route as route

WIDE = 1024  # numbers that a program takes at a time
HEADS = 16  # heads that a program takes at a time


def swiglu(gate: Tensor, up: Tensor, factor: Tensor | None) -> Tensor:
    """silu(gate) * up * factor: (rows, F), contiguous in F only; factor: (rows,) or None."""
    _check_halves(gate, up, factor)
    rows, width = gate.shape
    out = gate.new_empty(rows, width)
    if out.numel():
        inputs = gate, gate.stride(0), up, up.stride(0), factor, out
        _swiglu[_rows(rows, width)](*inputs, rows, width, **_tile(width))
    return out


def swiglu_backward(
    grad: Tensor, gate: Tensor, up: Tensor, factor: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """grad: (rows, F) -> gradients of gate and up as (rows, 2F), and where there is a factor its
    gradient (rows,) and the forward's result again.
    """
    _check_halves(gate, up, factor)
    _check("grad", grad, gate.shape, gate.dtype)
    rows, width = gate.shape
    both = gate.new_empty(rows, 2 * width)
    grad_factor, out = (
        (None, None) if factor is None else (torch.empty_like(factor), torch.empty_like(grad))
    )
    if grad.numel():
        inputs = grad, gate, gate.stride(0), up, up.stride(0), factor
        outputs = both, grad_factor, out
        _swiglu_backward[_rows(rows, width)](*inputs, *outputs, rows, width, **_tile(width))
    return both, grad_factor, out


def sum_rows(rows: Tensor, slots: Tensor) -> Tensor:
    """Sum of the K rows of each token; -1 names no row. rows: (rows, C), slots: (N, K) int64 ->
    (N, C). Another slot outside makes its token's sum nan: the host does not wait for a check.
    """
    _check("rows", rows, (len(rows), rows.shape[-1]), rows.dtype)
    _check("slots", slots, (len(slots), slots.shape[-1]), torch.int64)
    (tokens, many), width = slots.shape, rows.shape[1]
    out = rows.new_empty(tokens, width)
    if out.numel():
        sizes = tokens, len(rows), width
        _sum_rows[_rows(tokens, width)](rows, slots, out, *sizes, K=many, **_tile(width))
    return out


def to_heads(
    query: Tensor, kv: Tensor, k_rope: Tensor, angles: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Rotates and sorts into heads.

    Args:
        query: (B, T, H, nope+P); kv: (B, T, H, nope+v); k_rope: (B, T, P), whose rows need only be
            equally far apart.
        angles: (2, T, P/2) cos and sin, float32.
    Returns:
        query and key (B, T, H, nope+P), value (B, T, H, v)
    """
    sizes = _head_sizes(query, kv, k_rope)
    batch, length, heads = query.shape[:3]
    nope, rope, value = sizes["NOPE"], sizes["ROPE"], sizes["VALUE"]
    _check("query", query, (batch, length, heads, nope + rope), query.dtype)
    _check("kv", kv, (batch, length, heads, nope + value), query.dtype)
    _check("angles", angles, (2, length, rope // 2), torch.float32)
    if k_rope.stride(2) != 1 or k_rope.stride(0) != length * k_rope.stride(1):
        raise ValueError(f"k_rope: rows must be equally far apart (strides {k_rope.stride()})")
    q, k, v = (
        torch.empty_like(query),
        torch.empty_like(query),
        query.new_empty(*query.shape[:3], sizes["VALUE"]),
    )
    tokens = query.shape[0] * query.shape[1]
    _to_heads[tokens,](
        query,
        kv,
        k_rope,
        k_rope.stride(1),
        angles,
        q,
        k,
        v,
        query.shape[1],
        query.shape[2],
        **sizes,
    )
    return q, k, v


def to_heads_backward(
    grad_q: Tensor, grad_k: Tensor, grad_v: Tensor, angles: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `to_heads`' results, in their shapes -> those of query, kv and k_rope."""
    batch, length, heads, width = grad_q.shape
    rope, value = 2 * angles.shape[-1], grad_v.shape[-1]
    query, kv = (
        torch.empty_like(grad_q),
        grad_q.new_empty(batch, length, heads, width - rope + value),
    )
    k_rope = grad_q.new_empty(batch, length, rope)
    sizes = _head_sizes(query, kv, k_rope)
    tensors = grad_q, grad_k, grad_v, angles, query, kv, k_rope
    _to_heads_backward[batch * length,](*tensors, length, heads, **sizes)
    return query, kv, k_rope


def cross_entropy_(logits: Tensor, targets: Tensor, row_weight: Tensor) -> tuple[Tensor, Tensor]:
    """logits (rows, V) become weight * (softmax - onehot); returns nll and prediction."""
    _check("logits", logits, (len(logits), logits.shape[-1]), logits.dtype)
    _check("targets", targets, logits.shape[:1], torch.int64)
    _check("row_weight", row_weight, logits.shape[:1], torch.float32)
    nll, prediction = torch.empty_like(row_weight), torch.empty_like(targets)
    if len(logits):
        tensors = logits, targets, row_weight, nll, prediction
        _cross_entropy[len(logits),](
            *tensors, logits.shape[1], BLOCK=min(4096, _power(logits.shape[1])), num_warps=8
        )
    return nll, prediction


def _check(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """A contiguous tensor with this shape and type: kernels follow raw pointers.

    Raises:
        ValueError: it is another.
    """
    if tensor.shape != shape or tensor.dtype != dtype or not tensor.is_contiguous():
        raise ValueError(
            f"{name}: must be contiguous, {dtype}, of shape {tuple(shape)} (got {tensor.dtype} of "
            f"shape {tuple(tensor.shape)}, strides {tensor.stride()})"
        )


def _check_halves(gate: Tensor, up: Tensor, factor: Tensor | None) -> None:
    for name, half in (("gate", gate), ("up", up)):
        if half.ndim != 2 or half.stride(1) != 1 or half.shape != gate.shape:
            raise ValueError(
                f"{name}: must be a matrix of shape {tuple(gate.shape)} with contiguous rows "
                f"(got {tuple(half.shape)}, strides {half.stride()})"
            )
        if half.dtype != gate.dtype:
            raise ValueError(f"{name}: must be {gate.dtype} (got {half.dtype})")
    if factor is not None:
        _check("factor", factor, gate.shape[:1], torch.float32)


def _power(size: int) -> int:
    return triton.next_power_of_2(size)


def _tile(width: int) -> dict[str, int]:
    """The part of a matrix that one program takes: of a narrow one several rows."""
    block = min(WIDE, _power(width))
    return {"ROWS": WIDE // block, "BLOCK": block}


def _rows(rows: int, width: int) -> tuple[int]:
    return (triton.cdiv(rows, _tile(width)["ROWS"]),)


def _head_sizes(query: Tensor, kv: Tensor, k_rope: Tensor) -> dict[str, Any]:
    rope = k_rope.shape[-1]
    nope = query.shape[-1] - rope
    value = kv.shape[-1] - nope
    return {
        "NOPE": nope,
        "ROPE": rope,
        "VALUE": value,
        "NOPE_BLOCK": _power(nope),
        "ROPE_BLOCK": _power(rope),
        "VALUE_BLOCK": _power(value),
        "HEADS": min(HEADS, _power(query.shape[2])),
    }
