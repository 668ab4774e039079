"""One transformer layer: x + MLA(norm(x)), then x + feed-forward(norm(x))."""

from torch import Tensor, nn

from dsv3_mtp.config import ModelConfig
from dsv3_mtp.model.attention import MLA
from dsv3_mtp.model.layers import MLP, RMSNorm
from dsv3_mtp.model.moe import MoE, RouterStats


class DecoderLayer(nn.Module):
    """The feed-forward is dense in the first `first_k_dense_replace` layers, a mixture of experts afterwards."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = MLA(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        dense = layer < config.first_k_dense_replace
        self.mlp: MLP | MoE = MLP(config.hidden_size, config.intermediate_size) if dense else MoE(config)

    def forward(self, x: Tensor, angles: Tensor, mask: Tensor | None) -> tuple[Tensor, RouterStats | None]:
        """x: (B, T, C) -> (B, T, C) and the router's stats, None for a dense layer."""
        x = x + self.self_attn(self.input_layernorm(x), angles, mask)
        out = self.mlp(self.post_attention_layernorm(x))
        y, stats = out if isinstance(self.mlp, MoE) else (out, None)
        return x + y, stats
