"""RMSNorm, alone and of a residual addition."""

from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv3_mtp.ops import c, choice

# Numbers from which one kernel for both is worth its launch: a launch by Triton is some 15 us of
# the host, and the three passes over 8 MiB that it saves are 8 us of a GPU. Decoding stays below.
LARGE = 2**22


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dimension, computed in at least float32.

    x: (..., C), weight: (C,) -> (..., C), in the type of x.
    """
    if x.is_cuda:
        return F.rms_norm(x, weight.shape, weight, eps)
    if choice.kernels(x, weight) is c:
        return _RMSNorm.apply(x, weight, eps)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def add_rms_norm(x: Tensor, added: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + added, and its rms_norm. x, added: (..., C), weight: (C,) -> (..., C) both."""
    if (kernels := _large(x, weight)) is not None and added.dtype == x.dtype:
        return _AddRMSNorm.apply(kernels, x, added, weight, eps)
    total = x + added
    return total, rms_norm(total, weight, eps)


def norm_of_sum(total: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The norm that `add_rms_norm` gave beside this sum, bit for bit."""
    if (kernels := _large(total, weight)) is not None:
        return _AddRMSNorm.apply(kernels, total, None, weight, eps)[1]
    return rms_norm(total, weight, eps)


def _large(x: Tensor, weight: Tensor) -> ModuleType | None:
    kernels = choice.kernels(x, weight)
    return None if kernels is c or x.numel() < LARGE else kernels


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, kernels: ModuleType, x: Tensor, added: Tensor | None, weight: Tensor, eps: float
    ) -> tuple[Tensor | None, Tensor]:
        rows = _rows(x)
        other = None if added is None else _rows(added)
        total, y, scale = kernels.add_rms_norm(rows, other, weight, eps)
        if added is not None:
            # saved as what is returned: to autograd, and to `recomputed`
            total = total.view(x.shape)
        ctx.kernels = kernels
        ctx.save_for_backward(total, weight, scale)
        return None if added is None else total, y.view(x.shape)

    @staticmethod
    def backward(ctx: Any, residual: Tensor | None, grad: Tensor) -> Any:
        total, weight, scale = ctx.saved_tensors
        also = None if residual is None else _rows(residual)
        slopes = _rows(grad), also, _rows(total)
        learns = ctx.needs_input_grad[3]
        slope, grad_weight = ctx.kernels.add_rms_norm_backward(
            *slopes, weight, scale, learns=learns
        )
        slope = slope.view(grad.shape)
        return None, slope, slope if ctx.needs_input_grad[2] else None, grad_weight, None


def _rows(x: Tensor) -> Tensor:
    return x.contiguous().view(-1, x.shape[-1])


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        rows = x.flatten(0, -2)
        rows = rows if rows.stride(1) == 1 else rows.contiguous()
        y, scale = c.rms_norm(rows, weight, eps)
        ctx.save_for_backward(rows, weight, scale)
        return y.view(x.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        rows, weight, scale = ctx.saved_tensors
        slope = grad.contiguous().view(rows.shape)
        grad_x, grad_weight = c.rms_norm_backward(slope, rows, weight, scale)
        return grad_x.view(grad.shape), grad_weight, None
