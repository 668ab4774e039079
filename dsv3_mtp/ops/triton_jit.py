"""The kernels of triton_kernels.py, as Triton compiles them. They follow raw pointers: whoever
calls one has checked its arguments.
"""

import triton
import triton.language as tl


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
    NOPE_BLOCK: tl.constexpr, ROPE_BLOCK: tl.constexpr, VALUE_BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
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
    NOPE_BLOCK: tl.constexpr, ROPE_BLOCK: tl.constexpr, VALUE_BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
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
    """Every lane first keeps the maximum, its place and the sum of exponentials it meets."""
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
