"""A residual addition and the RMSNorm of the sum as one Triton kernel each way; norm.py has the
same in torch's operations. A program takes whole rows.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 1024  # numbers that a program takes at a time, at least one row
PROGRAMS = 512  # of the backward: each adds up the weight's gradient over its rows


def add_rms_norm(
    x: Tensor, added: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """x, added: (rows, C), contiguous; added None: x is the sum already. weight: (C,).

    Returns:
        h = x + added, h / rms(h) * weight, both (rows, C), and 1 / rms (rows,) float32
    """
    rows, width = x.shape
    for name, tensor, shape in (
        ("x", x, x.shape),
        ("added", added, x.shape),
        ("weight", weight, (width,)),
    ):
        _check(name, tensor, shape, x.dtype)
    total = x if added is None else torch.empty_like(x)
    out, scale = torch.empty_like(x), x.new_empty(rows, dtype=torch.float32)
    if x.numel():
        tensors = x, added, weight, total, out, scale
        _add_rms_norm[_programs(rows, width),](*tensors, rows, eps, width, **_tile(width))
    return total, out, scale


def add_rms_norm_backward(
    grad: Tensor, residual: Tensor | None, h: Tensor, weight: Tensor, scale: Tensor, *, learns: bool
) -> tuple[Tensor, Tensor | None]:
    """grad, residual: gradients of the norm and, where it is read elsewhere too, of the sum; h and
    scale as `add_rms_norm` gave them.

    Returns:
        gradient of the sum (rows, C), and if it `learns` of the weight (C,)
    """
    rows, width = h.shape
    for name, tensor in (("grad", grad), ("residual", residual), ("h", h)):
        _check(name, tensor, h.shape, h.dtype)
    _check("weight", weight, (width,), h.dtype)
    _check("scale", scale, (rows,), torch.float32)
    programs = min(PROGRAMS, _programs(rows, width))
    out = torch.empty_like(h)
    partial = scale.new_empty(programs, width) if learns else None
    if h.numel():
        tensors = grad, residual, h, weight, scale, out, partial
        _add_rms_norm_backward[programs,](*tensors, rows, width, programs, **_tile(width))
    return out, None if partial is None else partial.sum(0).to(weight.dtype)


def _check(name: str, tensor: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if tensor is None:
        return
    if tensor.shape != shape or tensor.dtype != dtype or not tensor.is_contiguous():
        raise ValueError(
            f"{name}: must be contiguous, {dtype}, of shape {tuple(shape)} (got {tensor.dtype} of "
            f"shape {tuple(tensor.shape)}, strides {tensor.stride()})"
        )


def _tile(width: int) -> dict[str, int]:
    block = triton.next_power_of_2(width)
    return {"ROWS": max(1, TILE // block), "BLOCK": block, "num_warps": 8 if block > 2048 else 4}


def _programs(rows: int, width: int) -> int:
    return triton.cdiv(rows, _tile(width)["ROWS"])


@triton.jit
def _add_rms_norm(
    x, added, weight, total, out, scale, rows, eps, width: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    c = tl.arange(0, BLOCK)[None, :]
    at, inside = row * width + c, (row < rows) & (c < width)
    h = tl.load(x + at, inside, other=0.0)
    if added is not None:
        h = h.to(tl.float32) + tl.load(added + at, inside, other=0.0).to(tl.float32)
        h = h.to(total.dtype.element_ty)  # the norm is of what the backward reads
        tl.store(total + at, h, inside)
    h = h.to(tl.float32)
    r = tl.rsqrt(tl.sum(h * h, 1)[:, None] / width + eps)
    tl.store(scale + row, r, row < rows)
    tl.store(out + at, h * r * tl.load(weight + c, c < width, other=0.0).to(tl.float32), inside)


@triton.jit
def _add_rms_norm_backward(
    grad, residual, h, weight, scale, out, partial, rows, width: tl.constexpr, programs,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    c = tl.arange(0, BLOCK)[None, :]
    w = tl.load(weight + c, c < width, other=0.0).to(tl.float32)
    learnt = tl.zeros([ROWS, BLOCK], tl.float32)
    for first in range(tl.program_id(0) * ROWS, rows, programs * ROWS):
        row = first + tl.arange(0, ROWS).to(tl.int64)[:, None]
        at, inside = row * width + c, (row < rows) & (c < width)
        g = tl.load(grad + at, inside, other=0.0).to(tl.float32)
        r = tl.load(scale + row, row < rows, other=0.0)
        unit = tl.load(h + at, inside, other=0.0).to(tl.float32) * r
        along = tl.sum(g * w * unit, 1)[:, None] / width
        slope = r * (g * w - unit * along)
        if residual is not None:
            slope += tl.load(residual + at, inside, other=0.0).to(tl.float32)
        tl.store(out + at, slope, inside)
        learnt += g * unit
    if partial is not None:
        place = partial + tl.program_id(0).to(tl.int64) * width + c
        tl.store(place, tl.sum(learnt, 0)[None, :], c < width)
