"""SwiGLU: silu(gate) * up, with a factor per row for the routed experts."""

from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv3_mtp.ops import choice


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, which keeps its two inputs and nothing else. Any shape."""
    return _SwiGLU.apply(gate, up)


def gated_swiglu(gate_up: Tensor, factor: Tensor) -> Tensor:
    """silu(gate) * up * factor. gate_up: (rows, 2F), gate first; factor: (rows,) -> (rows, F)."""
    return _GatedSwiGLU.apply(gate_up, factor)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.kernels = choice.kernels(gate, up)
        return forward(ctx.kernels, _matrix(gate), _matrix(up), None).view(gate.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        gate, up = ctx.saved_tensors
        both, _, _ = backward(ctx.kernels, _matrix(grad), _matrix(gate), _matrix(up), None)
        width = gate.shape[-1]
        return both[:, :width].reshape(gate.shape), both[:, width:].reshape(up.shape)


class _GatedSwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up, factor)
        ctx.kernels = choice.kernels(gate_up)
        gate, up = gate_up.chunk(2, dim=1)
        return forward(ctx.kernels, gate, up, factor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        gate_up, factor = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=1)
        grad_gate_up, grad_factor, _ = backward(ctx.kernels, grad.contiguous(), gate, up, factor)
        return grad_gate_up, grad_factor


def _matrix(x: Tensor) -> Tensor:
    return x.contiguous().view(-1, x.shape[-1])


def forward(kernels: ModuleType | None, gate: Tensor, up: Tensor, factor: Tensor | None) -> Tensor:
    """silu(gate) * up * factor. gate, up: (rows, F), rows contiguous; factor: (rows,) or None."""
    if kernels is not None:
        return kernels.swiglu(gate, up, factor)
    y = F.silu(gate) * up
    return y if factor is None else y.mul_(factor.unsqueeze(1))


def backward(
    kernels: ModuleType | None, grad: Tensor, gate: Tensor, up: Tensor, factor: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """grad: (rows, F) -> gradients of gate and up as (rows, 2F), and where there is a factor its
    gradient (rows,) and the forward's result again.
    """
    if kernels is not None:
        return kernels.swiglu_backward(grad, gate, up, factor)
    sigmoid = gate.sigmoid()
    silu = gate * sigmoid
    slope = sigmoid + silu * (1 - sigmoid)
    if factor is None:
        return torch.cat([grad * up * slope, grad * silu], dim=1), None, None
    plain, scaled = silu * up, (grad * factor.unsqueeze(1)).to(grad.dtype)
    grad_factor = torch.linalg.vecdot(grad, plain).to(factor.dtype)
    both = torch.cat([scaled * up * slope, scaled * silu], dim=1)
    return both, grad_factor, plain.mul_(factor.unsqueeze(1))
