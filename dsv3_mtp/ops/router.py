"""The router's product, in float32 whatever the tokens are in (V3 section 3.3: high precision)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def router_logits(x: Tensor, weight: Tensor) -> Tensor:
    """x: (B, T, C), weight: (E, C) -> (B, T, E) in at least float32; keeps no wide copy of x."""
    return _Logits.apply(x, weight)


class _Logits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        wide = torch.promote_types(x.dtype, torch.float32)
        if x.is_cuda and x.dtype == weight.dtype == torch.bfloat16:
            # tensor cores multiply bfloat16 exactly and add in float32: at their speed the same sum
            rows = torch.mm(x.flatten(0, -2), weight.t(), out_dtype=wide)
            return rows.unflatten(0, x.shape[:-1])
        return F.linear(x.to(wide), weight.to(wide))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        grad_x = (grad @ weight.to(grad.dtype)).to(x.dtype) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return grad_x, None
        rows = x.flatten(0, -2).to(grad.dtype)
        return grad_x, (grad.flatten(0, -2).t() @ rows).to(weight.dtype)
