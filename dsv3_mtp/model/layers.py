"""RMSNorm, rotary embedding with interleaved pairs and YaRN, SwiGLU MLP."""

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dsv3_mtp.config import ModelConfig, RopeScaling
from dsv3_mtp.ops.compute import given
from dsv3_mtp.ops.norm import add_rms_norm, norm_of_sum, rms_norm
from dsv3_mtp.ops.recompute import recomputed, remember
from dsv3_mtp.ops.swiglu import swiglu


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, computed in at least float32."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class ResidualNorm(RMSNorm):
    """A residual addition and the norm of the sum, in one pass where there is a kernel for both."""

    def forward(self, x: Tensor, added: Tensor | None = None) -> Any:
        """x, added: (..., C) -> their sum and its norm; of a sum alone only its norm."""
        if added is None:
            return norm_of_sum(x, self.weight, self.eps)
        total, y = add_rms_norm(x, added, self.weight, self.eps)
        remember(y, self, total)  # by the module: ZeRO-3 has its weight only inside of a call
        return total, y


class MLP(nn.Module):
    """SwiGLU feed-forward: down(silu(gate(x)) * up(x)). The dense layers and the shared experts."""

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        kind: Literal["dense_mlp", "shared_experts"] = "dense_mlp",
    ):
        super().__init__()
        linear = given().linear
        self.gate_proj = linear(kind, hidden_size, intermediate_size)
        self.up_proj = linear(kind, hidden_size, intermediate_size)
        self.down_proj = linear(kind, intermediate_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(recomputed(swiglu, self.gate_proj(x), self.up_proj(x)))


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
    """YaRN (arXiv 2309.00071; V3 4.3): slow pairs interpolated, fast ones kept, a ramp between."""
    dim = config.qk_rope_head_dim

    # index of the pair that turns `rotations` times in the original context
    def pair_with(rotations: float) -> float:
        turns = scaling.original_max_position_embeddings / (rotations * 2 * math.pi)
        return dim * math.log(turns) / (2 * math.log(config.rope_theta))

    low, high = pair_with(scaling.beta_fast), pair_with(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    pairs = torch.arange(dim // 2, dtype=torch.float32, device=frequency.device)
    interpolate = ((pairs - low) / max(high - low, 0.001)).clamp(0, 1)
    return frequency * (1 - interpolate) + frequency / scaling.factor * interpolate


def yarn_mscale(factor: float, mscale: float) -> float:
    """YaRN's temperature 0.1 * mscale * ln(factor) + 1 (V3 4.3: sqrt(t) = 0.1 ln s + 1)."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0
