"""One transformer layer: x + MLA(norm(x)), then x + feed-forward(norm(x))."""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dsv3_mtp.config import ModelConfig
from dsv3_mtp.model.attention import MLA
from dsv3_mtp.model.layers import MLP, ResidualNorm, RMSNorm
from dsv3_mtp.model.moe import MoE, RouterStats
from dsv3_mtp.ops.compute import given
from dsv3_mtp.ops.recompute import recomputed, recomputing


class DecoderLayer(nn.Module):
    """The feed-forward is dense in the first `first_k_dense_replace` layers, a mixture of experts
    afterwards.

    `recompute`: none keeps what backward needs; selective makes the norms, MLA's
    up-projections and SwiGLU again (V3 sections 3.2.3, 3.3.3); full the whole block, from its
    input. The router's stats are those that the first computation returned, so that nothing is
    counted twice.
    """

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = MLA(config)
        self.post_attention_layernorm = ResidualNorm(config.hidden_size, config.rms_norm_eps)
        dense = layer < config.first_k_dense_replace
        self.mlp: MLP | MoE = (
            MLP(config.hidden_size, config.intermediate_size) if dense else MoE(config)
        )
        self.recompute = given().recompute

    def forward(
        self, x: Tensor, angles: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, RouterStats | None]:
        """x: (B, T, C) -> (B, T, C) and the router's stats, None for a dense layer."""
        if self.recompute == "none" or not torch.is_grad_enabled():
            return self.compute(x, angles, mask)
        if self.recompute == "full":
            return checkpoint(
                self.compute, x, angles, mask, use_reentrant=False, preserve_rng_state=False
            )
        with recomputing():
            return self.compute(x, angles, mask)

    def compute(
        self, x: Tensor, angles: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, RouterStats | None]:
        attended = self.self_attn(recomputed(self.input_layernorm, x), angles, mask)
        x, normed = self.post_attention_layernorm(x, attended)
        out = self.mlp(normed)
        y, stats = out if isinstance(self.mlp, MoE) else (out, None)
        return x + y, stats
