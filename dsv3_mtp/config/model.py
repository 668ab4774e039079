"""The `model` section: the trunk.

"V3" is arXiv 2412.19437; numbers in brackets are DeepSeek-V3's own. Import these names from
dsv3_mtp.config.
"""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from dsv3_mtp.config.reader import Problem
from dsv3_mtp.config.section import (
    Boolean,
    Count,
    Integer,
    Layers,
    NotNegative,
    Number,
    OnResume,
    Positive,
    Section,
    Width,
)

# V3 4.2: the length of pre-training, against which the paper's token counts become fractions
V3_TOKENS = 14.8e12


class RopeScaling(Section):
    """YaRN on the decoupled rotary key (V3 4.3)."""

    type: Literal["yarn"]
    factor: Annotated[Number, Field(ge=1, le=1e18)]
    """Context extension factor s (V3: 40)."""
    original_max_position_embeddings: Count
    """Context length before the extension, tokens (V3: 4096)."""
    beta_fast: Positive = 32.0
    """Rotations above which a frequency is left alone (V3 4.3: beta)."""
    beta_slow: Positive = 1.0
    """Rotations below which a frequency is interpolated (V3 4.3: alpha)."""
    mscale: NotNegative = 1.0
    """Attention temperature: sqrt(t) = 0.1 * mscale * ln(s) + 1."""
    mscale_all_dim: NotNegative = 1.0
    """The same for the softmax scale of all dimensions, as in the released code."""
    truncate: Boolean = True
    """The ramp between the two begins and ends at whole pairs, as in the released code."""

    def rules(self) -> Iterator[Problem]:
        if self.beta_fast < self.beta_slow:
            yield "beta_fast", f"must be >= beta_slow = {self.beta_slow} (got {self.beta_fast})"


class ModelConfig(Section):
    """The trunk. Names are HF's DeepseekV3Config keys, values in brackets V3's own (V3 4.2)."""

    on_resume = OnResume.FIXED

    vocab_size: Annotated[Integer, Field(ge=2, le=2**24)]
    """Rows of the embedding and of the output head (129280)."""
    hidden_size: Width
    """Width of the residual stream (7168)."""
    intermediate_size: Width
    """FFN width of the dense layers (18432)."""
    moe_intermediate_size: Width
    """FFN width of one expert (2048)."""
    num_hidden_layers: Layers
    """Trunk layers, MTP modules not counted (61)."""
    num_attention_heads: Width
    """Heads (128)."""
    q_lora_rank: Width | None
    """Rank of the query compression (1536); null: none, a plain projection."""
    kv_lora_rank: Width
    """Rank of the key-value latent, the cached one (512)."""
    qk_nope_head_dim: Width
    """Per-head key width without position (128)."""
    qk_rope_head_dim: Width
    """Width of the rotary key shared by the heads, even (64)."""
    v_head_dim: Width
    """Per-head value width (128)."""
    n_routed_experts: Width
    """Routed experts of a MoE layer (256)."""
    n_shared_experts: Annotated[Integer, Field(ge=0, le=2**16)] = 1
    """Experts that see every token (1)."""
    num_experts_per_tok: Width
    """Routed experts per token, top-k (8)."""
    n_group: Width
    """Expert groups; a token may use experts of topk_group of them (8)."""
    topk_group: Width
    """Groups per token (4)."""
    routed_scaling_factor: Positive = 2.5
    """Factor on the routed gates (2.5; released code, not in the paper)."""
    norm_topk_prob: Boolean = True
    """Gates of the chosen experts sum to one before scaling (V3 eq. 13)."""
    first_k_dense_replace: Annotated[Integer, Field(ge=0, le=2**20)]
    """Leading layers with a dense FFN (3)."""
    max_position_embeddings: Annotated[Integer, Field(ge=1, le=2**26)]
    """Longest sequence, tokens (4096 in pre-training)."""
    rope_theta: Annotated[Number, Field(gt=1, le=1e18)] = 10000.0
    """Rotary base."""
    rope_scaling: RopeScaling | None = None
    """Long-context extension; null in pre-training."""
    rms_norm_eps: Positive = 1e-6
    """Added to the mean square."""
    initializer_range: Positive = 0.006
    """Standard deviation of every weight at the start (V3 4.2)."""

    def rules(self) -> Iterator[Problem]:
        if self.qk_rope_head_dim % 2:
            text = "must be even, rotary embedding turns pairs"
            yield "qk_rope_head_dim", f"{text} (got {self.qk_rope_head_dim})"
        if self.first_k_dense_replace > self.num_hidden_layers:
            text = f"must be <= model.num_hidden_layers = {self.num_hidden_layers}"
            yield "first_k_dense_replace", f"{text} (got {self.first_k_dense_replace})"
        yield from self._routing_rules()

    def _routing_rules(self) -> Iterator[Problem]:
        if self.n_routed_experts % self.n_group:
            text = f"must be a multiple of model.n_group = {self.n_group}"
            yield "n_routed_experts", f"{text} (got {self.n_routed_experts})"
        if self.topk_group > self.n_group:
            yield "topk_group", f"must be <= model.n_group = {self.n_group} (got {self.topk_group})"
        per_group = self.n_routed_experts // self.n_group
        reachable = per_group * min(self.topk_group, self.n_group)
        if self.num_experts_per_tok > reachable:
            groups = f"{self.topk_group} groups (model.topk_group)"
            text = f"must be <= {reachable}, the experts in {groups}"
            yield "num_experts_per_tok", f"{text} (got {self.num_experts_per_tok})"
        if self.n_group > 1 and per_group < 2:
            text = f"must be <= {self.n_routed_experts // 2} or 1"
            yield "n_group", f"{text}, a group is scored by its top 2 experts (got {self.n_group})"
