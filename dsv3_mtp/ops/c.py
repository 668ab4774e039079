"""The C kernels of a training step on a CPU, in float32 and bfloat16 (csrc/): the passes between
the matrix products, and the attention core with its products.

c_library.py builds and loads them. Arithmetic is float32 for both types; factors per row (scales,
gates, weights of the loss) and angles are float32 beside either. Every function checks what it
hands to C: raw pointers are followed without question there.
"""

import torch
from torch import Tensor

from dsv3_mtp.ops.c_library import call

# blocks of rows whose sums are added last: the same for any number of threads, hence the same
# result
PARTS = 16


def check(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """A contiguous tensor on the CPU with this shape and type.

    Raises:
        ValueError: it is another.
    """
    if tensor.shape != shape or tensor.dtype != dtype or tensor.device.type != "cpu":
        raise ValueError(
            f"{name}: must be {dtype} of shape {tuple(shape)} on the CPU (got {tensor.dtype} of "
            f"shape {tuple(tensor.shape)} on {tensor.device})"
        )
    if not tensor.is_contiguous():
        raise ValueError(f"{name}: must be contiguous (its strides are {tensor.stride()})")


def _check_rows(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """A matrix on the CPU whose rows are contiguous, each for itself.

    Raises:
        ValueError: it is another.
    """
    if tensor.ndim != 2 or tensor.stride(1) != 1:
        raise ValueError(
            f"{name}: must be a matrix with contiguous rows (got shape {tuple(tensor.shape)}, "
            f"strides {tensor.stride()})"
        )
    if tensor.shape != shape or tensor.dtype != dtype or tensor.device.type != "cpu":
        check(name, tensor, shape, dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x: (rows, C), contiguous in C only; weight: (C,) -> y (rows, C), 1/rms (rows,)."""
    _check_rows("x", x, x.shape, x.dtype)
    check("weight", weight, x.shape[1:], x.dtype)
    y, scale = x.new_empty(x.shape), x.new_empty(x.shape[0], dtype=torch.float32)
    call("rms_norm", x.dtype, x, x.stride(0), weight, y, scale, *x.shape, eps)
    return y, scale


def rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """grad: (rows, C); the rest as in and from `rms_norm` -> gradients of x and of weight."""
    _check_rows("x", x, x.shape, x.dtype)
    check("weight", weight, x.shape[1:], x.dtype)
    check("grad", grad, x.shape, x.dtype)
    check("scale", scale, x.shape[:1], torch.float32)
    grad_x, partial = x.new_empty(x.shape), scale.new_empty(PARTS, x.shape[1])
    inputs = grad, x, x.stride(0), weight, scale
    call("rms_norm_backward", x.dtype, *inputs, grad_x, partial, *x.shape, PARTS)
    return grad_x, partial.sum(0).to(weight.dtype)


def swiglu(gate: Tensor, up: Tensor, factor: Tensor | None) -> Tensor:
    """silu(gate) * up * factor: (rows, F), contiguous in F only; factor: (rows,) or None."""
    _check_rows("gate", gate, gate.shape, gate.dtype)
    _check_rows("up", up, gate.shape, gate.dtype)
    if factor is not None:
        check("factor", factor, gate.shape[:1], torch.float32)
    y = gate.new_empty(gate.shape)
    inputs = gate, gate.stride(0), up, up.stride(0), factor
    call("swiglu", gate.dtype, *inputs, y, *gate.shape)
    return y


def swiglu_backward(
    grad: Tensor, gate: Tensor, up: Tensor, factor: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """grad: (rows, F) -> gradients of gate and up as (rows, 2F), and where there is a factor its
    gradient (rows,) and the forward's result again.
    """
    _check_rows("gate", gate, gate.shape, gate.dtype)
    _check_rows("up", up, gate.shape, gate.dtype)
    check("grad", grad, gate.shape, gate.dtype)
    (rows, width), (grad_factor, y) = gate.shape, (None, None)
    if factor is not None:
        check("factor", factor, gate.shape[:1], torch.float32)
        grad_factor, y = torch.empty_like(factor), torch.empty_like(grad)
    both = gate.new_empty(rows, 2 * width)
    inputs = grad, gate, gate.stride(0), up, up.stride(0), factor
    outputs = both, both[:, width:], 2 * width, grad_factor, y
    call("swiglu_backward", gate.dtype, *inputs, *outputs, rows, width)
    return both, grad_factor, y


def attention(
    query: Tensor, kv: Tensor, k_rope: Tensor, angles: Tensor, first: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Causal attention, rotary parts turned on the way.

    Args:
        query: (B, T, H, nope+P); kv: (B, T, H, nope+v) keys and values; k_rope: (B, T, P), shared
            by the heads, whose rows need only be equally far apart.
        angles: (2, T, P/2) cos and sin.
        first: (B, T) int64, the first slot that each slot attends to; None: 0.
    Returns:
        (B, T, H, v), and of every softmax the largest score and 1 / sum for the backward, (2, B, H,
        T).
    """
    sizes = _attention_sizes(query, kv, k_rope, angles, first)
    batch, length, heads, _, _, value = sizes
    out = query.new_empty(batch, length, heads, value)
    softmax = angles.new_empty(2, batch, heads, length)
    inputs = query, kv, k_rope, k_rope.stride(1), angles[0], angles[1], first
    call("attention", query.dtype, *inputs, out, softmax[0], softmax[1], *sizes, scale)
    return out, softmax


def attention_backward(
    grad: Tensor,
    query: Tensor,
    kv: Tensor,
    k_rope: Tensor,
    angles: Tensor,
    first: Tensor | None,
    softmax: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """grad: (B, T, H, v); the rest as in `attention` -> gradients of query, kv and k_rope."""
    sizes = _attention_sizes(query, kv, k_rope, angles, first)
    batch, length, heads, _, rope, value = sizes
    check("grad", grad, (batch, length, heads, value), query.dtype)
    check("softmax", softmax, (2, batch, heads, length), torch.float32)
    grads = torch.empty_like(query), torch.empty_like(kv), k_rope.new_empty(k_rope.shape)
    each = angles.new_empty(batch, heads, length, rope)  # of k_rope from each head
    inputs = query, kv, k_rope, k_rope.stride(1), angles[0], angles[1], first
    outputs = grads[0], grads[1], each, grads[2]
    call(
        "attention_backward",
        query.dtype,
        *(*inputs, grad, softmax[0], softmax[1], *outputs, *sizes, scale),
    )
    return grads


def _attention_sizes(
    query: Tensor, kv: Tensor, k_rope: Tensor, angles: Tensor, first: Tensor | None
) -> tuple[int, int, int, int, int, int]:
    """B, T, H, nope, P, v of checked operands."""
    (batch, length, heads, width), rope = query.shape, k_rope.shape[-1]
    nope = width - rope
    value = kv.shape[-1] - nope
    check("query", query, (batch, length, heads, nope + rope), query.dtype)
    check("kv", kv, (batch, length, heads, nope + max(value, 1)), query.dtype)
    check("angles", angles, (2, length, rope // 2), torch.float32)
    if k_rope.shape != (batch, length, rope) or k_rope.dtype != query.dtype or rope % 2:
        raise ValueError(
            f"k_rope: must be {query.dtype} of shape {(batch, length, 'even')} "
            f"(got {k_rope.dtype} of shape {tuple(k_rope.shape)})"
        )
    if k_rope.stride(2) != 1 or k_rope.stride(0) != length * k_rope.stride(1):
        raise ValueError(f"k_rope: rows must be equally far apart (strides {k_rope.stride()})")
    if first is not None:
        check("first", first, (batch, length), torch.int64)
    return batch, length, heads, nope, rope, value


def sum_rows(x: Tensor, index: Tensor) -> Tensor:
    """x[index].sum(1), added up in float32; -1 names no row. x: (rows, C), index: (N, K) int64 ->
    (N, C).

    Raises:
        IndexError: an index is neither -1 nor a row of x.
    """
    check("x", x, (x.shape[0], x.shape[-1]), x.dtype)
    check("index", index, (index.shape[0], index.shape[-1]), torch.int64)
    y = x.new_empty(index.shape[0], x.shape[1])
    if outside := call("sum_rows", x.dtype, x, len(x), index, y, *index.shape, x.shape[1]):
        raise IndexError(f"index: {outside} numbers are outside -1 .. {len(x) - 1}, the rows of x")
    return y


def cross_entropy_(logits: Tensor, targets: Tensor, row_weight: Tensor) -> tuple[Tensor, Tensor]:
    """logits (rows, V) become row_weight * (softmax - onehot); returns nll (float32) and
    prediction, (rows,) each. A target outside 0 .. V-1 has the loss nan.
    """
    rows = logits.shape[:1]
    check("logits", logits, (*rows, logits.shape[-1]), logits.dtype)
    check("targets", targets, rows, torch.int64)
    check("row_weight", row_weight, rows, torch.float32)
    nll, prediction = torch.empty_like(row_weight), torch.empty_like(targets)
    inputs = logits, targets, row_weight
    call("cross_entropy", logits.dtype, *inputs, nll, prediction, *logits.shape)
    return nll, prediction


def dequantise(codes: Tensor, scale_inv: Tensor, dtype: torch.dtype) -> Tensor:
    """The numbers of matrices in block-FP8, rounded once to `dtype`.

    Args:
        codes: (M, rows, columns) uint8, the bits of E4M3.
        scale_inv: (M, rows/128, columns/128) float32, partial blocks included.
    """
    matrices, rows, columns = codes.shape
    check("codes", codes, (matrices, rows, columns), torch.uint8)
    blocks = (matrices, -(-rows // 128), -(-columns // 128))
    check("scale_inv", scale_inv, blocks, torch.float32)
    y = torch.empty(codes.shape, dtype=dtype)
    call("dequantise", dtype, codes, scale_inv, y, matrices, rows, columns)
    return y
