"""RMSNorm, rotary embedding with interleaved pairs and YaRN, SwiGLU MLP."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsv3_mtp.config import ModelConfig, RopeScaling
from dsv3_mtp.ops import fused, kernels
from dsv3_mtp.ops.recompute import again


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, computed in at least float32."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cuda" and not torch.compiler.is_compiling():
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        if kernels.usable(x, self.weight):
            return _RMSNorm.apply(x, self.weight, self.eps)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


class MLP(nn.Module):
    """SwiGLU feed-forward: down(silu(gate(x)) * up(x)). The dense layers and the shared experts."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(again(_SiLUMul.apply, self.gate_proj(x), self.up_proj(x)))


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float):
        rows = x.flatten(0, -2)
        rows = rows if rows.stride(1) == 1 else rows.contiguous()
        y, scale = kernels.rms_norm(rows, weight, eps)
        ctx.save_for_backward(rows, weight, scale)
        return y.view(x.shape)

    @staticmethod
    def backward(ctx, grad: Tensor):
        rows, weight, scale = ctx.saved_tensors
        grad_x, grad_weight = kernels.rms_norm_backward(
            grad.contiguous().view(rows.shape), rows, weight, scale
        )
        return grad_x.view(grad.shape), grad_weight, None


class _SiLUMul(torch.autograd.Function):
    """silu(gate) * up, which keeps its two inputs and nothing else."""

    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor):
        ctx.save_for_backward(gate, up)  # both come from products: contiguous
        return silu_mul(gate, up)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return silu_mul_backward(grad, *ctx.saved_tensors)


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    if fused.usable(gate):
        return fused.kernels.silu_mul(gate, up)
    if kernels.usable(gate, up):
        return kernels.swiglu(gate.flatten(0, -2), up.flatten(0, -2)).view(gate.shape)
    return F.silu(gate) * up


def silu_mul_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """-> gradients of gate and up."""
    if fused.usable(grad):
        return fused.kernels.silu_mul_backward(grad.contiguous(), gate, up)
    if kernels.usable(grad, gate, up):
        grads = kernels.swiglu_backward(*(x.flatten(0, -2) for x in (grad.contiguous(), gate, up)))
        return grads[0].view(gate.shape), grads[1].view(up.shape)
    sigmoid = gate.sigmoid()
    silu = gate * sigmoid
    return grad * up * (sigmoid + silu * (1 - sigmoid)), grad * silu


class Rows:
    """Which slots of the rows of a batch this process has: all. In parallel/sequence.py: slice
    `number` of `count`.
    """

    number, count = 0, 1

    def cut(self, x: Tensor, ahead: int) -> Tensor:
        """Whole rows (B, T + ahead) -> the slots of this slice and the tokens ahead of them, (B,
        T/count + ahead).
        """
        length = (x.shape[1] - ahead) // self.count
        return x[:, self.number * length : (self.number + 1) * length + ahead].contiguous()

    def gather(self, x: Tensor) -> Tensor:
        """(B, T, ..) of this slice -> (B, count * T, ..) of all slices in their order, without
        gradient.
        """
        return x


def rotary_angles(config: ModelConfig, positions: Tensor) -> Tensor:
    """Cosine and sine of each pair's rotation, YaRN-scaled if `rope_scaling` is set.

    Args:
        positions: (T,) or (B, T) integer positions.
    Returns:
        float32 (2, ..., P/2), times YaRN's attention factor, which is 1 for DeepSeek-V3 (mscale ==
        mscale_all_dim).
    """
    dim, scaling = config.qk_rope_head_dim, config.rope_scaling
    exponent = torch.arange(0, dim, 2, dtype=torch.float32, device=positions.device) / dim
    frequency = 1.0 / config.rope_theta**exponent  # (P/2,)
    magnitude = 1.0
    if scaling is not None:
        frequency = _yarn_frequency(frequency, config, scaling)
        magnitude = yarn_mscale(scaling.factor, scaling.mscale) / yarn_mscale(
            scaling.factor, scaling.mscale_all_dim
        )
    angle = positions[..., None].float() * frequency
    return torch.stack([angle.cos(), angle.sin()]) * magnitude


def _yarn_frequency(frequency: Tensor, config: ModelConfig, scaling: RopeScaling) -> Tensor:
    """YaRN (arXiv 2309.00071; V3 section 4.3): slow pairs interpolated by `factor`, fast ones kept,
    a ramp between.
    """
    dim = config.qk_rope_head_dim

    # index of the pair that turns `rotations` times in the original context
    def pair_with(rotations: float) -> float:
        turns = scaling.original_max_position_embeddings / (rotations * 2 * math.pi)
        return dim * math.log(turns) / (2 * math.log(config.rope_theta))

    low = max(math.floor(pair_with(scaling.beta_fast)), 0)
    high = min(math.ceil(pair_with(scaling.beta_slow)), dim - 1)
    pairs = torch.arange(dim // 2, dtype=torch.float32, device=frequency.device)
    interpolate = ((pairs - low) / max(high - low, 0.001)).clamp(0, 1)
    return frequency * (1 - interpolate) + frequency / scaling.factor * interpolate


def yarn_mscale(factor: float, mscale: float) -> float:
    """YaRN's attention temperature: 0.1 * mscale * ln(factor) + 1 (V3 section 4.3: sqrt(t) = 0.1 ln
    s + 1).
    """
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Rotates interleaved pairs (x_0, x_1), (x_2, x_3), ... as the released weights expect.

    Args:
        x: (B, T, H, P); angles: (2, T, P/2) or (2, B, T, P/2) from `rotary_angles`.
    """
    cos, sin = angles.unsqueeze(-2)  # (.., T, 1, P/2) each
    even, odd = x[..., 0::2], x[..., 1::2]
    return (
        torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
        .flatten(-2)
        .to(x.dtype)
    )
