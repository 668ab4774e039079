"""Multi-head latent attention (DeepSeek-V3 section 2.1.1, eqs. 1-11)."""

from functools import partial

from torch import Tensor, nn

from dsv3_mtp.config import ModelConfig
from dsv3_mtp.model.layers import RMSNorm, yarn_mscale
from dsv3_mtp.ops.attention import attend
from dsv3_mtp.ops.compute import given
from dsv3_mtp.ops.recompute import recomputed


class MLA(nn.Module):
    """Keys and values come from one compressed latent per token (R numbers) and one shared rotary
    key (P numbers).

    Queries are compressed as well when `q_lora_rank` is set. RMSNorm sits on both latents.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        linear, self.core = partial(given().linear, "attention"), given().core
        self.heads = config.num_attention_heads
        self.nope, self.rope, self.value = (
            config.qk_nope_head_dim,
            config.qk_rope_head_dim,
            config.v_head_dim,
        )
        self.kv_rank = config.kv_lora_rank
        hidden, query = config.hidden_size, self.heads * (self.nope + self.rope)
        self.q_compressed = config.q_lora_rank is not None
        if config.q_lora_rank is not None:
            self.q_a_proj = linear(hidden, config.q_lora_rank)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, config.rms_norm_eps)
            self.q_b_proj = linear(config.q_lora_rank, query)
        else:
            self.q_proj = linear(hidden, query)
        self.kv_a_proj_with_mqa = linear(hidden, self.kv_rank + self.rope)
        self.kv_a_layernorm = RMSNorm(self.kv_rank, config.rms_norm_eps)
        self.kv_b_proj = linear(self.kv_rank, self.heads * (self.nope + self.value))
        self.o_proj = linear(self.heads * self.value, hidden)
        self.scale = (self.nope + self.rope) ** -0.5
        # YaRN's temperature multiplies the logits: q and k each by mscale
        if config.rope_scaling is not None:
            self.scale *= (
                yarn_mscale(config.rope_scaling.factor, config.rope_scaling.mscale_all_dim) ** 2
            )

    def forward(self, x: Tensor, angles: Tensor, first: Tensor | None) -> Tensor:
        """x: (B, T, C); angles: (2, T, P/2) cos and sin; first: (B, T) int64, the first slot that
        each attends to, None = 0 -> (B, T, C).
        """
        query, (latent, k_rope) = self.queries(x), self.keys(x)
        # (.., nope+v)
        kv = recomputed(self.kv_b_proj, recomputed(self.kv_a_layernorm, latent)).unflatten(
            -1, (self.heads, -1)
        )
        return self.o_proj(attend(query, kv, k_rope, angles, self.scale, first, core=self.core))

    def queries(self, x: Tensor) -> Tensor:
        """x: (B, T, C) -> (B, T, H, nope+P), not yet rotated."""
        if self.q_compressed:
            query = recomputed(self.q_b_proj, recomputed(self.q_a_layernorm, self.q_a_proj(x)))
        else:
            query = self.q_proj(x)
        return query.unflatten(-1, (self.heads, -1))

    def keys(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x: (B, T, C) -> latents (B, T, R) without norm, keys (B, T, P) not yet rotated."""
        latent, k_rope = self.kv_a_proj_with_mqa(x).split([self.kv_rank, self.rope], dim=-1)
        return latent, k_rope
