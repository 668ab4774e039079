"""RMSNorm."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv3_mtp.ops import c, choice


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
