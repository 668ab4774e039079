"""What is trained: the `model` and `mtp` sections, and the base class of all sections.

"V3" is arXiv 2412.19437; numbers in brackets are DeepSeek-V3's own. Import these names from
dsv3_mtp.config.
"""

import os
from collections.abc import Iterator, Mapping
from enum import Enum
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from dsv3_mtp.config.reader import KeyProblems, Problem, show

# V3 4.2: the length of pre-training, against which the paper's token counts become fractions
V3_TOKENS = 14.8e12


def _not_bool(value: Any) -> Any:
    if isinstance(value, bool):  # pydantic would read true as 1
        raise ValueError("must be a number")
    return value


def _plain_name(name: str) -> str:
    if name in (".", "..") or "/" in name or "\\" in name or not name.isprintable():
        raise ValueError("must be a plain folder name; put folders into run.dir")
    return name


Integer = Annotated[int, BeforeValidator(_not_bool)]
Number = Annotated[float, BeforeValidator(_not_bool)]
Count = Annotated[Integer, Field(ge=1)]
NotNegative = Annotated[Number, Field(ge=0)]
Positive = Annotated[Number, Field(gt=0)]
Fraction = Annotated[Number, Field(ge=0, le=1)]
Text = Annotated[str, Field(min_length=1)]
FilePath = Annotated[
    Text, AfterValidator(os.path.expanduser)
]  # no shell expands the ~ of a config or of --set
FolderName = Annotated[Text, AfterValidator(_plain_name)]  # of run.name


class OnResume(Enum):
    """What a start may do with a key whose value differs from the checkpoint's. A key says it in
    its annotation, else its section does in `on_resume`, else the section that holds that one
    (resume.py).
    """

    FIXED = "refused: the weights or the place in the data fit the old value only"
    RECORDED = "said and recorded; refused where the run is finished"
    FREE = "accepted: no effect on what is learned"


class Section(BaseModel):
    """A frozen group of keys. `rules` yields what is wrong between them, as (key, text)."""

    on_resume: ClassVar[OnResume | None] = None

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )

    def rules(self) -> Iterator[Problem]:
        yield from ()

    @model_validator(mode="after")
    def _check_rules(self) -> Self:
        if problems := list(self.rules()):
            raise KeyProblems(problems)
        return self


# --- model --------------------------------------------------------------------------------------------------


class RopeScaling(Section):
    """YaRN on the decoupled rotary key (V3 4.3)."""

    type: Literal["yarn"]
    factor: Annotated[Number, Field(ge=1)]
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

    def rules(self) -> Iterator[Problem]:
        if self.beta_fast < self.beta_slow:
            yield "beta_fast", f"must be >= beta_slow = {self.beta_slow} (got {self.beta_fast})"


class ModelConfig(Section):
    """The trunk. Names are HF's DeepseekV3Config keys; values in brackets are DeepSeek-V3's (V3
    4.2).
    """

    on_resume = OnResume.FIXED

    vocab_size: Annotated[Integer, Field(ge=2)]
    """Rows of the embedding and of the output head (129280)."""
    hidden_size: Count
    """Width of the residual stream (7168)."""
    intermediate_size: Count
    """FFN width of the dense layers (18432)."""
    moe_intermediate_size: Count
    """FFN width of one expert (2048)."""
    num_hidden_layers: Count
    """Trunk layers, MTP modules not counted (61)."""
    num_attention_heads: Count
    """Heads (128)."""
    q_lora_rank: Count | None
    """Rank of the query compression (1536); null: none, a plain projection."""
    kv_lora_rank: Count
    """Rank of the key-value latent, the cached one (512)."""
    qk_nope_head_dim: Count
    """Per-head key width without position (128)."""
    qk_rope_head_dim: Count
    """Width of the rotary key shared by the heads, even (64)."""
    v_head_dim: Count
    """Per-head value width (128)."""
    n_routed_experts: Count
    """Routed experts of a MoE layer (256)."""
    n_shared_experts: Annotated[Integer, Field(ge=0)] = 1
    """Experts that see every token (1)."""
    num_experts_per_tok: Count
    """Routed experts per token, top-k (8)."""
    n_group: Count
    """Expert groups; a token may use experts of topk_group of them (8)."""
    topk_group: Count
    """Groups per token (4)."""
    routed_scaling_factor: Positive = 2.5
    """Factor on the routed gates (2.5; released code, not in the paper)."""
    norm_topk_prob: bool = True
    """Gates of the chosen experts sum to one before scaling (V3 eq. 13)."""
    first_k_dense_replace: Annotated[Integer, Field(ge=0)]
    """Leading layers with a dense FFN (3)."""
    max_position_embeddings: Count
    """Longest sequence, tokens (4096 in pre-training)."""
    rope_theta: Annotated[Number, Field(gt=1)] = 10000.0
    """Rotary base."""
    rope_scaling: RopeScaling | None = None
    """Long-context extension; null in pre-training."""
    rms_norm_eps: Positive = 1e-6
    """Added to the mean square."""
    initializer_range: Positive = 0.006
    """Standard deviation of every weight at the start (V3 4.2)."""

    def rules(self) -> Iterator[Problem]:
        if self.qk_rope_head_dim % 2:
            yield (
                "qk_rope_head_dim",
                f"must be even, rotary embedding turns pairs (got {self.qk_rope_head_dim})",
            )
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
            text = (
                f"must be <= {reachable}, the experts in "
                f"{self.topk_group} groups (model.topk_group)"
            )
            yield "num_experts_per_tok", f"{text} (got {self.num_experts_per_tok})"
        if self.n_group > 1 and per_group < 2:
            text = (
                f"must be <= {self.n_routed_experts // 2} or "
                "1, a group is scored by its top 2 experts"
            )
            yield "n_group", f"{text} (got {self.n_group})"


# --- multi-token prediction ---------------------------------------------------------------------------------


class ConstantWeight(Section):
    """lambda = value."""

    type: Literal["constant"] = "constant"
    value: NotNegative


class StepWeight(Section):
    """values[i], where i counts the fractions `at` that progress has reached (V3 4.2)."""

    type: Literal["step"] = "step"
    values: tuple[NotNegative, ...]
    at: tuple[Annotated[Number, Field(gt=0, lt=1)], ...]

    def rules(self) -> Iterator[Problem]:
        if len(self.values) != len(self.at) + 1:
            yield (
                "values",
                f"must hold one number more than 'at' (got {len(self.values)} and {len(self.at)})",
            )
        if list(self.at) != sorted(set(self.at)):
            yield "at", f"must increase (got {show(self.at)})"


class RampWeight(Section):
    """From `start` to `end` while progress goes from `begin` to `until`; constant outside."""

    type: Literal["linear", "cosine"]
    start: NotNegative
    end: NotNegative
    begin: Fraction = 0.0
    until: Fraction = 1.0

    def rules(self) -> Iterator[Problem]:
        if self.begin >= self.until:
            yield "until", f"must be > 'begin' = {self.begin} (got {self.until})"


class WarmupWeight(Section):
    """From 0 to `value` while progress goes from 0 to `until`; then constant."""

    type: Literal["warmup"] = "warmup"
    value: NotNegative
    until: Annotated[Number, Field(gt=0, le=1)]


class PiecewiseWeight(Section):
    """Straight lines through [progress, value] points; constant outside."""

    type: Literal["piecewise"] = "piecewise"
    points: tuple[tuple[Fraction, NotNegative], ...]

    def rules(self) -> Iterator[Problem]:
        if len(self.points) < 2:
            yield "points", f"must hold at least two points (got {show(self.points)})"
        at = [progress for progress, _ in self.points]
        if at != sorted(set(at)):
            yield "points", f"must be in order of progress, none twice (got {show(at)})"


def _number_is_constant(value: Any) -> Any:
    return value if isinstance(value, Mapping | Section) else {"type": "constant", "value": value}


LossWeight = Annotated[
    Annotated[
        ConstantWeight | StepWeight | RampWeight | WarmupWeight | PiecewiseWeight,
        Field(discriminator="type"),
    ],
    BeforeValidator(_number_is_constant),
]


class MTPConfig(Section):
    """The extra heads and their loss: L = L_main + lambda(progress) / D * sum_k w_k L_k (V3 eq.
    24-25).
    """

    on_resume = OnResume.FIXED

    mode: Literal["none", "sequential", "parallel", "parallel_linear"] = "sequential"
    """none: the baseline; sequential: V3 2.2; parallel: arXiv 2404.19737; parallel_linear: linear
    heads.
    """
    num_nextn_predict_layers: Annotated[Integer, Field(ge=0)] = 1
    """Depths D, additional tokens predicted (1). Mode none accepts it and predicts none: see
    `depths`.
    """
    loss_weight: Annotated[LossWeight, OnResume.RECORDED] = StepWeight(
        values=(0.3, 0.1), at=(10e12 / V3_TOKENS,)
    )
    """lambda over progress (V3 4.2: 0.3 for the first 10T tokens, then 0.1). A bare number is
    constant.
    """
    depth_weights: Annotated[tuple[NotNegative, ...] | None, OnResume.RECORDED] = None
    """w_k for k = 1..D; null: all 1 (V3 eq. 25)."""
    curriculum: Annotated[Literal["none", "forward", "reverse"], OnResume.RECORDED] = "none"
    """Active depths over equal stages: forward grows 1..D, reverse shrinks D..1 (arXiv
    2505.22757).
    """
    trunk_hidden: Literal["post_norm", "pre_norm"] = "post_norm"
    """Sequential: the trunk state that module 1 reads, after or before the final norm (open in V3
    2.2).
    """
    chain: Literal["hidden", "trunk"] = "hidden"
    """Sequential: module k reads h_{k-1} (V3 eq. 21), or always the trunk's state."""
    embed: bool = True
    """Sequential: modules read the embedding of the token at i+k (V3 eq. 21)."""
    share_weights: bool = False
    """Sequential: one module, used at every depth."""
    detach: Annotated[Literal["none", "trunk", "all"], OnResume.RECORDED] = "none"
    """Gradient stopped: none (V3), into the trunk, or into the trunk, the embedding and the output
    head.
    """

    @property
    def depths(self) -> int:
        """D, or 0 for the baseline."""
        return 0 if self.mode == "none" else self.num_nextn_predict_layers

    @property
    def reads_tokens(self) -> bool:
        """The heads read the embedding of the token before their target: what data/markov.py
        distinguishes.
        """
        return self.mode == "sequential" and self.embed

    def rules(self) -> Iterator[Problem]:
        if self.mode != "none" and self.num_nextn_predict_layers < 1:
            text = f"must be >= 1 with mode {self.mode} (got {self.num_nextn_predict_layers})"
            yield "num_nextn_predict_layers", f"{text}; mtp.mode=none turns the heads off"
        if (
            self.mode != "none"
            and self.depth_weights is not None
            and len(self.depth_weights) != self.depths
        ):
            text = f"must hold num_nextn_predict_layers = {self.depths} numbers"
            yield "depth_weights", f"{text} (got {len(self.depth_weights)})"
        for key in self.without_effect(self.mode):
            default, value = type(self).model_fields[key].default, getattr(self, key)
            if value != default:
                text = f"has no effect with mode {self.mode}; remove it or set {show(default)}"
                yield key, f"{text} (got {show(value)})"

    @staticmethod
    def without_effect(mode: str) -> tuple[str, ...]:
        """Keys that heads of this mode do not have."""
        keys: tuple[str, ...] = ()
        if mode != "sequential":
            keys = ("trunk_hidden", "chain", "embed", "share_weights")
        # D and lambda may stay, so that mtp.mode=none turns a file into its own baseline
        return (*keys, "depth_weights", "curriculum", "detach") if mode == "none" else keys
