"""Triton kernels for the passes between the matrix products of a training step on a GPU: the
counterpart of kernels.c.

Each reads its inputs once (the loss twice) and computes in float32. choice.py says when they are
used. Every function wants tensors that are contiguous unless it says otherwise.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv3_mtp.ops.triton_router import route as route

WIDE = 1024  # numbers that a program takes at a time
HEADS = 16  # heads that a program takes at a time


def swiglu(gate: Tensor, up: Tensor, factor: Tensor | None) -> Tensor:
    """silu(gate) * up * factor. gate, up: (rows, F), contiguous in F only; factor: (rows,) or
    None.
    """
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
    """logits (rows, V) become row_weight * (softmax - onehot); returns nll and prediction, (rows,)
    each.
    """
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
    """What one program takes of a matrix: a narrow one's rows several at a time, so that it has
    WIDE numbers.
    """
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


@triton.jit
def _swiglu(
    gate, gate_stride, up, up_stride, factor, out, rows, width: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    f = tl.full([ROWS, 1], 1.0, tl.float32)
    if factor is not None:
        f = tl.load(factor + row, row < rows, other=0.0)
    for start in range(0, width, BLOCK):
        c = start + tl.arange(0, BLOCK)[None, :]
        inside = (row < rows) & (c < width)
        a = tl.load(gate + row * gate_stride + c, inside, other=0.0).to(tl.float32)
        b = tl.load(up + row * up_stride + c, inside, other=0.0).to(tl.float32)
        tl.store(out + row * width + c, a * tl.sigmoid(a) * b * f, inside)


@triton.jit
def _swiglu_backward(
    grad, gate, gate_stride, up, up_stride, factor, both, grad_factor, out, rows,
    width: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    f = tl.full([ROWS, 1], 1.0, tl.float32)
    if factor is not None:
        f = tl.load(factor + row, row < rows, other=0.0)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, width, BLOCK):
        c = start + tl.arange(0, BLOCK)[None, :]
        inside = (row < rows) & (c < width)
        g = tl.load(grad + row * width + c, inside, other=0.0).to(tl.float32)
        a = tl.load(gate + row * gate_stride + c, inside, other=0.0).to(tl.float32)
        b = tl.load(up + row * up_stride + c, inside, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(a)
        silu = a * sigmoid
        at = both + row * 2 * width + c
        tl.store(at, g * f * b * (sigmoid + silu * (1 - sigmoid)), inside)
        tl.store(at + width, g * f * silu, inside)
        if factor is not None:
            total += g * silu * b
            tl.store(out + row * width + c, silu * b * f, inside)
    if factor is not None:
        tl.store(grad_factor + row, tl.sum(total, 1)[:, None], row < rows)


@triton.jit
def _sum_rows(
    rows, slots, out, tokens, count, width: tl.constexpr,
    K: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    for start in range(0, width, BLOCK):
        c = start + tl.arange(0, BLOCK)[None, :]
        inside = (token < tokens) & (c < width)
        total = tl.zeros([ROWS, BLOCK], tl.float32)
        for k in tl.static_range(K):
            row = tl.load(slots + token * K + k, token < tokens, other=0)
            known = (row >= 0) & (row < count)
            read = tl.load(rows + row * width + c, inside & known, other=0.0).to(tl.float32)
            total += tl.where(known | (row == -1), read, float("nan"))
        tl.store(out + token * width + c, total, inside)


@triton.jit
def _angles(angles, slot, length, ROPE: tl.constexpr, ROPE_BLOCK: tl.constexpr):
    """Cosines and sines of a slot's pairs, (ROPE_BLOCK / 2,) each."""
    pair = tl.arange(0, ROPE_BLOCK // 2)
    place = slot * (ROPE // 2) + pair
    cos = tl.load(angles + place, pair < ROPE // 2)
    sin = tl.load(angles + length * (ROPE // 2) + place, pair < ROPE // 2)
    return cos, sin


@triton.jit
def _turn(x, cos, sin):
    """Pairs (x_0, x_1), (x_2, x_3), ... of the last dimension, (rows, 2 n), turned by n angles."""
    even, odd = tl.split(tl.reshape(x, [x.shape[0], x.shape[1] // 2, 2]))
    cos, sin = cos[None, :], sin[None, :]
    return tl.reshape(
        tl.join(even * cos - odd * sin, even * sin + odd * cos), [x.shape[0], x.shape[1]]
    )


@triton.jit
def _to_heads(
    query, kv, k_rope, k_rope_stride, angles, q, k, v, length, heads: tl.constexpr,
    NOPE: tl.constexpr, ROPE: tl.constexpr, VALUE: tl.constexpr,
    NOPE_BLOCK: tl.constexpr, ROPE_BLOCK: tl.constexpr, VALUE_BLOCK: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """One program takes one token."""
    token = tl.program_id(0).to(tl.int64)
    n, r, u = (
        tl.arange(0, NOPE_BLOCK)[None, :],
        tl.arange(0, ROPE_BLOCK)[None, :],
        tl.arange(0, VALUE_BLOCK)[None, :],
    )
    cos, sin = _angles(angles, token % length, length, ROPE, ROPE_BLOCK)
    # (1, ROPE_BLOCK)
    shared = _turn(tl.load(k_rope + token * k_rope_stride + r, r < ROPE).to(tl.float32), cos, sin)
    for first in range(0, heads, HEADS):
        head = first + tl.arange(0, HEADS)[:, None]
        there = head < heads
        row = token * heads + head
        wide, narrow = row * (NOPE + ROPE), row * (NOPE + VALUE)
        tl.store(q + wide + n, tl.load(query + wide + n, there & (n < NOPE)), there & (n < NOPE))
        turned = _turn(
            tl.load(query + wide + NOPE + r, there & (r < ROPE)).to(tl.float32), cos, sin
        )
        tl.store(q + wide + NOPE + r, turned, there & (r < ROPE))
        tl.store(k + wide + n, tl.load(kv + narrow + n, there & (n < NOPE)), there & (n < NOPE))
        tl.store(
            k + wide + NOPE + r, tl.broadcast_to(shared, [HEADS, ROPE_BLOCK]), there & (r < ROPE)
        )
        tl.store(
            v + row * VALUE + u,
            tl.load(kv + narrow + NOPE + u, there & (u < VALUE)),
            there & (u < VALUE),
        )


@triton.jit
def _to_heads_backward(
    grad_q, grad_k, grad_v, angles, query, kv, k_rope, length, heads: tl.constexpr,
    NOPE: tl.constexpr, ROPE: tl.constexpr, VALUE: tl.constexpr,
    NOPE_BLOCK: tl.constexpr, ROPE_BLOCK: tl.constexpr, VALUE_BLOCK: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    n, r, u = (
        tl.arange(0, NOPE_BLOCK)[None, :],
        tl.arange(0, ROPE_BLOCK)[None, :],
        tl.arange(0, VALUE_BLOCK)[None, :],
    )
    cos, sin = _angles(angles, token % length, length, ROPE, ROPE_BLOCK)
    sin = -sin  # back
    shared = tl.zeros([HEADS, ROPE_BLOCK], tl.float32)
    for first in range(0, heads, HEADS):
        head = first + tl.arange(0, HEADS)[:, None]
        there = head < heads
        row = token * heads + head
        wide, narrow = row * (NOPE + ROPE), row * (NOPE + VALUE)
        tl.store(
            query + wide + n, tl.load(grad_q + wide + n, there & (n < NOPE)), there & (n < NOPE)
        )
        turned = _turn(
            tl.load(grad_q + wide + NOPE + r, there & (r < ROPE)).to(tl.float32), cos, sin
        )
        tl.store(query + wide + NOPE + r, turned, there & (r < ROPE))
        tl.store(
            kv + narrow + n, tl.load(grad_k + wide + n, there & (n < NOPE)), there & (n < NOPE)
        )
        shared += tl.load(grad_k + wide + NOPE + r, there & (r < ROPE), other=0.0).to(tl.float32)
        tl.store(
            kv + narrow + NOPE + u,
            tl.load(grad_v + row * VALUE + u, there & (u < VALUE)),
            there & (u < VALUE),
        )
    total = _turn(tl.sum(shared, 0)[None, :], cos, sin)
    tl.store(k_rope + token * ROPE + r, total, r < ROPE)


@triton.jit
def _cross_entropy(
    logits, targets, row_weight, nll, prediction, width: tl.constexpr, BLOCK: tl.constexpr
):
    """Every lane first keeps the maximum, its place and the sum of exponentials of the numbers that
    it meets.
    """
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row)
    lowest = -3.0e38  # not infinity, whose difference to itself is nan
    best = tl.full([BLOCK], lowest, tl.float32)
    place = tl.zeros([BLOCK], tl.int32)
    total, own = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for start in range(0, width, BLOCK):
        c = start + tl.arange(0, BLOCK)
        x = tl.load(logits + row * width + c, c < width, other=lowest).to(tl.float32)
        higher = tl.maximum(best, x)
        total = total * tl.exp(best - higher) + tl.exp(x - higher)
        place = tl.where(x > best, c, place)
        own += tl.where(c == target, x, 0.0)
        best = higher
    top = tl.max(best, 0)
    total = tl.sum(total * tl.exp(best - top), 0)
    known = (target >= 0) & (target < width)  # a token outside the vocabulary has no loss: nan
    tl.store(nll + row, tl.where(known, tl.log(total) + top - tl.sum(own, 0), float("nan")))
    tl.store(prediction + row, tl.min(tl.where(best == top, place, width - 1), 0).to(tl.int64))
    factor = tl.load(row_weight + row)
    for start in range(0, width, BLOCK):
        c = start + tl.arange(0, BLOCK)
        x = tl.load(logits + row * width + c, c < width, other=lowest).to(tl.float32)
        tl.store(
            logits + row * width + c,
            (tl.exp(x - top) / total - tl.where(c == target, 1.0, 0.0)) * factor,
            c < width,
        )
