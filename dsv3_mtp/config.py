"""One YAML file is one run: the sections, their keys, units and sources, and the rules between them.

    config = load_config("configs/v3_tiny.yaml", ["mtp.mode=parallel", "optim.lr=1e-3"])
    config.model.hidden_size, config.mtp.depths, config.optim.schedule.warmup

"V3" is arXiv 2412.19437. Fractions are fractions of train.total_tokens, so a recipe carries over to any run length.
Unknown keys, values out of bounds and settings that would have no effect are errors, all reported at once. No torch here.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    model_validator,
)

from dsv3_mtp.config_deepspeed import check_deepspeed
from dsv3_mtp.config_reader import ConfigError, KeyProblems, Problem, problems_of, read_tree, show

__all__ = ["Config", "ConfigError", "LossWeight", "MTPConfig", "ModelConfig", "load_config"]

_V3_TOKENS = (
    14.8e12  # V3 4.2: the length of pre-training, against which the paper's token counts become fractions
)


def _not_bool(value: Any) -> Any:
    if isinstance(value, bool):  # pydantic would read true as 1
        raise ValueError("must be a number")
    return value


Integer = Annotated[int, BeforeValidator(_not_bool)]
Number = Annotated[float, BeforeValidator(_not_bool)]
Count = Annotated[Integer, Field(ge=1)]
NotNegative = Annotated[Number, Field(ge=0)]
Positive = Annotated[Number, Field(gt=0)]
Fraction = Annotated[Number, Field(ge=0, le=1)]
Text = Annotated[str, Field(min_length=1)]


class Section(BaseModel):
    """A frozen group of keys. `rules` yields what is wrong between them, as (key, text)."""

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


class RunConfig(Section):
    """Where the run lives and what it draws its random numbers from."""

    name: Text = "run"
    """The run's folder is DIR/NAME."""
    dir: Text = "runs"
    """Folder of all runs."""
    seed: Annotated[Integer, Field(ge=0)] = 1234
    """Initialisation and data order."""

    def rules(self) -> Iterator[Problem]:
        if self.name in (".", "..") or "/" in self.name or "\\" in self.name:
            yield "name", f"must be a plain folder name; put folders into run.dir (got {show(self.name)})"


# --- model -----------------------------------------------------------------------------------------------------------


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


class ModelConfig(Section):
    """The trunk. Names are HF's DeepseekV3Config keys; values in brackets are DeepSeek-V3's (V3 4.2)."""

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
    rope_theta: Positive = 10000.0
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
            text = f"must be <= {reachable}, the experts in model.topk_group = {self.topk_group} groups of {per_group}"
            yield "num_experts_per_tok", f"{text} (got {self.num_experts_per_tok})"
        if self.n_group > 1 and per_group < 2:
            text = f"leaves {per_group} expert(s) per group, but a group's score is the sum of its top 2"
            yield "n_group", f"{text}; use at most {self.n_routed_experts // 2}, or 1 (got {self.n_group})"


# --- multi-token prediction ------------------------------------------------------------------------------------------


class ConstantWeight(Section):
    """lambda = value."""

    type: Literal["constant"] = "constant"
    value: NotNegative


class StepWeight(Section):
    """values[i], where i counts the fractions `at` that progress has reached. V3 4.2: 0.3 for 10T tokens, then 0.1."""

    type: Literal["step"] = "step"
    values: tuple[NotNegative, ...]
    at: tuple[Annotated[Number, Field(gt=0, lt=1)], ...]

    def rules(self) -> Iterator[Problem]:
        if len(self.values) != len(self.at) + 1:
            yield "values", f"must hold one number more than 'at' (got {len(self.values)} and {len(self.at)})"
        if list(self.at) != sorted(set(self.at)):
            yield "at", f"must increase (got {show(list(self.at))})"


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
    points: Annotated[tuple[tuple[Fraction, NotNegative], ...], Field(min_length=2)]

    def rules(self) -> Iterator[Problem]:
        at = [progress for progress, _ in self.points]
        if at != sorted(set(at)):
            yield "points", f"must be in order of progress, none twice (got {show(at)})"


def _number_is_constant(value: Any) -> Any:
    return value if isinstance(value, Mapping | Section) else {"type": "constant", "value": value}


LossWeight = Annotated[
    Annotated[
        ConstantWeight | StepWeight | RampWeight | WarmupWeight | PiecewiseWeight, Field(discriminator="type")
    ],
    BeforeValidator(_number_is_constant),
]


class MTPConfig(Section):
    """The extra heads and their loss: L = L_main + lambda(progress) / D * sum_k w_k L_k (V3 eq. 24-25)."""

    mode: Literal["none", "sequential", "parallel", "parallel_linear"] = "sequential"
    """none: the baseline. sequential: V3 2.2. parallel: arXiv 2404.19737. parallel_linear: one linear map per head."""
    num_nextn_predict_layers: Annotated[Integer, Field(ge=0)] = 1
    """Depths D, additional tokens predicted (V3 4.2: 1). With mode none it has no effect, see `depths`."""
    loss_weight: LossWeight = StepWeight(values=(0.3, 0.1), at=(10e12 / _V3_TOKENS,))
    """lambda as a function of progress (V3 4.2: 0.3 for the first 10T tokens, then 0.1). A bare number is constant."""
    depth_weights: tuple[NotNegative, ...] | None = None
    """w_k for k = 1..D; null: all 1 (V3 eq. 25)."""
    curriculum: Literal["none", "forward", "reverse"] = "none"
    """Active depths over equal stages: forward grows 1..D, reverse shrinks D..1 (arXiv 2505.22757)."""
    trunk_hidden: Literal["post_norm", "pre_norm"] = "post_norm"
    """Sequential: the trunk state fed to module 1, after or before the trunk's final norm (open in V3 2.2)."""
    chain: Literal["hidden", "trunk"] = "hidden"
    """Sequential: module k reads h_{k-1} (V3 eq. 21), or always the trunk's state."""
    embed: bool = True
    """Sequential: modules read the embedding of the token at i+k (V3 eq. 21)."""
    share_weights: bool = False
    """Sequential: one module, used at every depth."""
    detach: Literal["none", "trunk", "all"] = "none"
    """Gradient stopped: none (V3), into the trunk, or into the trunk, the embedding and the output head."""

    @property
    def depths(self) -> int:
        """D, or 0 for the baseline."""
        return 0 if self.mode == "none" else self.num_nextn_predict_layers

    def rules(self) -> Iterator[Problem]:
        if self.mode != "none" and self.num_nextn_predict_layers < 1:
            text = f"must be >= 1 with mode {self.mode} (got {self.num_nextn_predict_layers})"
            yield "num_nextn_predict_layers", f"{text}; mtp.mode=none turns the heads off"
        if self.mode != "none" and self.depth_weights is not None and len(self.depth_weights) != self.depths:
            text = f"must hold num_nextn_predict_layers = {self.depths} numbers"
            yield "depth_weights", f"{text} (got {len(self.depth_weights)})"
        if self.mode != "sequential":
            yield from self._without_effect("trunk_hidden", "chain", "embed", "share_weights")
        if (
            self.mode == "none"
        ):  # D and lambda may stay, so that mtp.mode=none turns a file into its own baseline
            yield from self._without_effect("depth_weights", "curriculum", "detach")

    def _without_effect(self, *keys: str) -> Iterator[Problem]:
        for key in keys:
            value, default = getattr(self, key), type(self).model_fields[key].default
            if value != default:
                value = list(value) if isinstance(value, tuple) else value
                yield (
                    key,
                    f"has no effect with mode {self.mode}; remove it or set {show(default)} (got {show(value)})",
                )


# --- data and training -----------------------------------------------------------------------------------------------


class DataEntry(Section):
    """One corpus of a mixture."""

    path: Text
    """Prepared folder or Megatron prefix."""
    weight: Positive
    """Relative share of the sampled sequences."""


def _one_or_many(value: Any) -> str:
    return "<one>" if isinstance(value, str) else "<many>"


class DataConfig(Section):
    """Where tokens come from. Documents are packed (V3 4.1)."""

    train: Annotated[
        Annotated[Text, Tag("<one>")] | Annotated[tuple[DataEntry, ...], Field(min_length=1), Tag("<many>")],
        Discriminator(_one_or_many),
    ]
    """Prepared folder, Megatron prefix (PREFIX.bin, PREFIX.idx), or a list of {path, weight}."""
    val: Text
    """Prepared folder (its validation split) or Megatron prefix."""
    build: Literal["pystdlib"] | None = None
    """Corpus to build into the folder `train` when that is missing: the running interpreter's standard library."""
    seq_len: Annotated[Integer, Field(ge=2)]
    """Positions per sequence, T (V3 4.2: 4096). A sample holds T + 1 + D tokens."""
    mask_documents: bool = False
    """Mask attention, targets and MTP inputs across document boundaries (V3 4.1: not done)."""

    def rules(self) -> Iterator[Problem]:
        if self.build is not None and not isinstance(self.train, str):
            yield "build", f"needs one folder in data.train, not a list; set null (got {show(self.build)})"


class ScheduleConfig(Section):
    """Learning rate over progress (V3 4.2): warm-up from 0, constant, cosine, constant, low constant."""

    warmup: Fraction = 0.0084
    """End of the linear warm-up (2K of about 240K steps)."""
    decay_start: Fraction = 10e12 / _V3_TOKENS
    """Start of the cosine."""
    decay_end: Fraction = 14.3e12 / _V3_TOKENS
    """End of the cosine."""
    decay_ratio: Fraction = 0.1
    """Rate after the cosine, over lr (2.2e-5 / 2.2e-4)."""
    final_start: Fraction = 14.633e12 / _V3_TOKENS
    """Start of the last stage."""
    final_ratio: Fraction = 7.3e-6 / 2.2e-4
    """Rate of the last stage, over lr."""

    def rules(self) -> Iterator[Problem]:
        order = ("warmup", "decay_start", "decay_end", "final_start")
        for before, after in zip(order, order[1:], strict=False):
            if getattr(self, before) > getattr(self, after):
                text = f"must be >= {before} = {getattr(self, before)} (got {getattr(self, after)})"
                yield after, text


class OptimConfig(Section):
    """AdamW (V3 4.2)."""

    lr: Positive = 2.2e-4
    """Peak learning rate."""
    betas: tuple[Annotated[Number, Field(ge=0, lt=1)], Annotated[Number, Field(ge=0, lt=1)]] = (0.9, 0.95)
    """Decay of the first and second moment."""
    eps: Positive = 1e-8
    """Added to the root of the second moment."""
    weight_decay: NotNegative = 0.1
    """Decoupled weight decay of matrices."""
    grad_clip: NotNegative = 1.0
    """Largest global gradient norm; 0: no clipping."""
    schedule: ScheduleConfig = ScheduleConfig()


class BatchSizeRamp(Section):
    """Batch size grows linearly with progress from `start` at 0 to train.batch_size at `until` (V3 4.2)."""

    start: Count
    """Sequences per step at the start (V3: 3072)."""
    until: Annotated[Number, Field(gt=0, le=1)]
    """Fraction at which train.batch_size is reached (V3: 469B of 14.8T tokens = 0.0317)."""


class TrainConfig(Section):
    """How long, how wide and in which numbers."""

    total_tokens: Count
    """Length of the run (V3 4.2: 14.8e12). Progress is tokens consumed over this."""
    batch_size: Count
    """Sequences per optimizer step over all ranks (V3: 15360)."""
    micro_batch_size: Count
    """Sequences per rank and forward."""
    batch_size_ramp: BatchSizeRamp | None = None
    """null: batch_size from the first step."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Weights and activations in the forward; master weights are float32 (V3 3.3)."""
    bias_update_speed: NotNegative = 0.001
    """Router bias step gamma (V3 2.1.2, 4.2)."""
    bias_update_until: Fraction = 14.3e12 / _V3_TOKENS
    """Fraction from which gamma is 0 (V3 4.2: after 14.3T tokens)."""
    balance_loss_weight: NotNegative = 0.0001
    """alpha of the sequence-wise balance loss (V3 eq. 17, 4.2)."""
    threads: Count | None = None
    """CPU threads per rank; null: cores over ranks of this host."""

    def rules(self) -> Iterator[Problem]:
        of = f"must be a multiple of train.micro_batch_size = {self.micro_batch_size}"
        if self.batch_size % self.micro_batch_size:
            yield "batch_size", f"{of} (got {self.batch_size})"
        if self.batch_size_ramp is not None:
            start = self.batch_size_ramp.start
            if start % self.micro_batch_size:
                yield "batch_size_ramp.start", f"{of} (got {start})"
            if start > self.batch_size:
                yield (
                    "batch_size_ramp.start",
                    f"must be <= train.batch_size = {self.batch_size} (got {start})",
                )


class ParallelConfig(Section):
    """How ranks share the work."""

    zero_stage: Literal[0, 1] = 1
    """DeepSpeed ZeRO: 0 keeps optimizer states whole on every rank, 1 shards them (V3 3.1 uses 1)."""
    timeout_s: Positive = 600.0
    """Seconds after which a hung collective fails."""


class CheckpointConfig(Section):
    """When to save."""

    every: Count = 100
    """Steps between checkpoints; the last step is always saved."""
    keep: Count = 2
    """Newest checkpoints kept."""
    resume: Literal["auto", "never"] = "auto"
    """auto: go on from the newest checkpoint of this run; never: fail if there is one."""


class EvalConfig(Section):
    """Validation during training."""

    every: Annotated[Integer, Field(ge=0)] = 100
    """Steps between validations; 0: only at the end."""
    batches: Count = 16
    """Batches of micro_batch_size sequences, over all ranks."""


class WandbConfig(Section):
    """Weights & Biases."""

    project: Text
    entity: Text | None = None
    group: Text | None = None


class LogConfig(Section):
    """What is written besides metrics.jsonl."""

    every: Count = 10
    """Steps between lines."""
    tensorboard: bool = True
    """Write event files to the run's tb folder."""
    wandb: WandbConfig | None = None
    """null: off."""


# --- the whole -------------------------------------------------------------------------------------------------------


class Config(Section):
    """One run."""

    run: RunConfig = RunConfig()
    model: ModelConfig
    mtp: MTPConfig = MTPConfig()
    data: DataConfig
    optim: OptimConfig = OptimConfig()
    train: TrainConfig
    parallel: ParallelConfig = ParallelConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    eval: EvalConfig = EvalConfig()
    log: LogConfig = LogConfig()
    deepspeed: Annotated[dict[str, Any], AfterValidator(check_deepspeed)] = {}
    """Merged over the generated DeepSpeed JSON; keys that this file owns are refused."""

    def rules(self) -> Iterator[Problem]:
        yield from _rules_between(dict(self))

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists and numbers, every default filled in."""
        return self.model_dump(mode="json")

    def to_yaml(self) -> str:
        """YAML that load_config reads back into an equal Config."""
        return yaml.dump(self.to_dict(), Dumper=_Dumper, sort_keys=False, width=110)


def _rules_between(sections: Mapping[str, Any]) -> Iterator[Problem]:
    """Rules between sections, as far as they parsed."""
    model, data, train = (sections.get(name) for name in ("model", "data", "train"))
    if model and data and data.seq_len > model.max_position_embeddings:
        text = f"must be <= model.max_position_embeddings = {model.max_position_embeddings}"
        yield "data.seq_len", f"{text} (got {data.seq_len})"
    if train and data and train.total_tokens < (step := train.batch_size * data.seq_len):
        text = f"must be >= one step, train.batch_size * data.seq_len = {step}"
        yield "train.total_tokens", f"{text} (got {train.total_tokens})"


class _Dumper(yaml.SafeDumper):
    """Mappings as blocks, lists on one line."""


_Dumper.add_representer(
    list, lambda d, value: d.represent_sequence("tag:yaml.org,2002:seq", value, flow_style=True)
)


def load_config(path: str | Path, sets: Iterable[str] = ()) -> Config:
    """Reads and checks a run's YAML. sets: overrides such as "mtp.mode=none", values in YAML, applied first.

    Raises ConfigError, whose text is a report of every problem in the file and in the overrides.
    """
    tree, problems = read_tree(path, sets)
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        problems += problems_of(error, tree, Config)
        problems += [problem for problem in _rules_between(_parsed(tree)) if problem not in problems]
    if problems:
        raise ConfigError(str(path), problems)
    return config


def _parsed(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The sections of a faulty tree that are valid on their own."""
    sections = {}
    for name, field in Config.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            with suppress(ValidationError):
                sections[name] = field.annotation.model_validate(tree.get(name))
    return sections
