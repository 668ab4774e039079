"""The whole of a run, and its sections other than model and mtp: keys, units, sources, rules
between them.

"V3" is arXiv 2412.19437; numbers in brackets are DeepSeek-V3's own. Fractions are of
train.total_tokens, so that a recipe carries over to any run length. Unknown keys and settings
without effect are errors.
"""

import logging
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError

from dsv3_mtp.config import code, layout
from dsv3_mtp.config.data import DataConfig, Task
from dsv3_mtp.config.deepspeed import check_deepspeed
from dsv3_mtp.config.model import V3_TOKENS, ModelConfig, MTPConfig, option_problems, unused_keys
from dsv3_mtp.config.precision import AttentionConfig, FP8Config
from dsv3_mtp.config.reader import (
    UNKNOWN,
    ConfigError,
    Problem,
    did_you_mean,
    key_paths,
    problems_of,
    show,
)
from dsv3_mtp.config.section import (
    Count,
    FilePath,
    FolderName,
    Fraction,
    Integer,
    NotNegative,
    Number,
    OnResume,
    Positive,
    Section,
    Text,
    not_bool,
)
from dsv3_mtp.config.tree import Document, dump_tree, read_document

_LOG = logging.getLogger("dsv3_mtp")  # without a handler Python prints its warnings to stderr


class RunConfig(Section):
    """Where the run lives and what it draws its random numbers from."""

    on_resume = OnResume.FREE

    name: FolderName = "run"
    """The run's folder is DIR/NAME."""
    dir: FilePath = "runs"
    """Folder of all runs."""
    seed: Annotated[Integer, Field(ge=0, lt=2**63), OnResume.FIXED] = 1234
    """Initialisation and data order."""


class ScheduleConfig(Section):
    """Learning rate over progress (V3 4.2): warm-up from 0, constant, cosine, constant, low
    constant.
    """

    warmup: Fraction = 0.0084
    """End of the linear warm-up (2K of about 240K steps)."""
    decay_start: Fraction = 10e12 / V3_TOKENS
    """Start of the cosine."""
    decay_end: Fraction = 14.3e12 / V3_TOKENS
    """End of the cosine."""
    decay_ratio: Fraction = 0.1
    """Rate after the cosine, over lr (2.2e-5 / 2.2e-4)."""
    final_start: Fraction = 14.633e12 / V3_TOKENS
    """Start of the last stage."""
    final_ratio: Fraction = 7.3e-6 / 2.2e-4
    """Rate of the last stage, over lr."""

    def rules(self) -> Iterator[Problem]:
        order = ("warmup", "decay_start", "decay_end", "final_start")
        for before, after in pairwise(order):
            if getattr(self, before) > getattr(self, after):
                text = f"must be >= {before} = {getattr(self, before)} (got {getattr(self, after)})"
                yield after, text


class OptimConfig(Section):
    """AdamW (V3 4.2)."""

    on_resume = OnResume.RECORDED

    lr: Positive = 2.2e-4
    """Peak learning rate."""
    betas: tuple[Annotated[Number, Field(ge=0, lt=1)], Annotated[Number, Field(ge=0, lt=1)]] = (
        0.9,
        0.95,
    )
    """Decay of the first and second moment."""
    eps: Positive = 1e-8
    """Added to the root of the second moment."""
    weight_decay: NotNegative = 0.1
    """Decoupled weight decay of matrices."""
    grad_clip: NotNegative = 1.0
    """Largest global gradient norm; 0: no clipping."""
    moments: Literal["float32", "bfloat16"] = "float32"
    """How the two moments are kept between steps (V3 3.3.3: bfloat16); masters are float32 with
    both.
    """
    schedule: ScheduleConfig = ScheduleConfig()


class BatchSizeRamp(Section):
    """Batch size grows linearly with progress from `start` at 0 to train.batch_size at `until` (V3
    4.2).
    """

    start: Count
    """Sequences per step at the start (V3: 3072)."""
    until: Annotated[Number, Field(gt=0, le=1)]
    """Fraction at which train.batch_size is reached (V3: 469B of 14.8T tokens = 0.0317)."""


class TrainConfig(Section):
    """How long, how wide and in which numbers."""

    on_resume = OnResume.RECORDED

    total_tokens: Count
    """Length of the run (V3 4.2: 14.8e12). Progress is tokens consumed over this."""
    batch_size: Count
    """Sequences per optimizer step over all ranks (V3: 15360)."""
    micro_batch_size: Annotated[Count, OnResume.FREE]
    """Sequences per forward of a rank, or of the sequence_parallel_size ranks that share them."""
    batch_size_ramp: BatchSizeRamp | None = None
    """null: batch_size from the first step."""
    dtype: Annotated[Literal["float32", "bfloat16"], OnResume.FIXED] = "bfloat16"
    """Weights and activations in the forward; master weights are float32 (V3 3.3)."""
    activation_checkpointing: Annotated[Literal["none", "selective", "full"], OnResume.FREE] = (
        "none"
    )
    """What backward makes again to save memory. selective: norms, MLA up-projections (V3 3.2.3);
    full: whole blocks.
    """
    bias_update_speed: NotNegative = 0.001
    """Router bias step gamma (V3 2.1.2, 4.2)."""
    bias_update_until: Fraction = 14.3e12 / V3_TOKENS
    """Fraction from which gamma is 0 (V3 4.2: after 14.3T tokens)."""
    balance_loss_weight: NotNegative = 0.0001
    """alpha of the sequence-wise balance loss (V3 eq. 17, 4.2)."""
    threads: Annotated[Count | None, OnResume.FREE] = None
    """CPU threads per rank; null: cores over ranks of this host."""
    init_from: FilePath | None = None
    """Folder of a DeepSeek-V3-layout checkpoint: weights and router biases at step 0; null:
    `initializer_range`.
    """
    freeze: Annotated[Literal["none", "trunk"], OnResume.FIXED] = "none"
    """trunk: only the MTP heads learn; embedding, trunk, router biases of the trunk and output head
    stay.
    """
    ema_decay: Annotated[Number, Field(gt=0, lt=1)] | None = None
    """Decay per step of an average of the weights, kept in host memory and in checkpoints (V3
    3.2.2); null: none.
    """

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

    on_resume = OnResume.FREE

    zero_stage: Annotated[Literal[0, 1, 2, 3], BeforeValidator(not_bool)] = 1
    """DeepSpeed ZeRO: 0 shards nothing, 1 optimizer states (V3 3.1), 2 also gradients, 3 also
    weights.
    """
    offload_optimizer: bool = False
    """Keep optimizer states and master weights in host memory, and update there (ZeRO 1, 2, 3)."""
    expert_parallel_size: Count = 1
    """Ranks that share the routed experts of a layer; the groups of ranks are copies (V3 3.2:
    64).
    """
    pipeline_stages: Count = 1
    """Stages into which the layers are cut, each on its own ranks (V3 3.2: 16)."""
    sequence_parallel_size: Count = 1
    """Ranks that share the slots of a row, for long rows (DeepSpeed-Ulysses)."""
    timeout_s: Annotated[Number, Field(gt=0, le=1e6)] = 600.0
    """Seconds after which a hung collective fails."""


class CheckpointConfig(Section):
    """When to save."""

    on_resume = OnResume.FREE

    every: Count = 100
    """Steps between checkpoints; the last step is always saved."""
    keep: Count = 2
    """Newest checkpoints kept."""
    resume: Literal["auto", "never"] = "auto"
    """auto: go on from the newest checkpoint of this run; never: fail if there is one."""


class EvalConfig(Section):
    """Validation during training."""

    on_resume = OnResume.FREE

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

    on_resume = OnResume.FREE

    every: Count = 10
    """Steps between lines."""
    tensorboard: bool = True
    """Write event files to the run's tb folder."""
    wandb: WandbConfig | None = None
    """null: off."""
    gradients: Annotated[Integer, Field(ge=0)] = 0
    """Steps between measurements of the angle between the main loss's and the heads' gradients on
    the trunk (optim/gradient_cosine), two more passes over a micro-batch each; a multiple of
    `every`. 0: none.
    """

    def rules(self) -> Iterator[Problem]:
        if self.gradients % self.every:
            text = f"must be a multiple of log.every = {self.every}, whose lines hold it"
            yield "gradients", f"{text} (got {self.gradients})"


class Config(Section):
    """One run."""

    run: RunConfig = RunConfig()
    model: ModelConfig
    mtp: MTPConfig = Field(default_factory=MTPConfig)
    data: DataConfig
    optim: OptimConfig = OptimConfig()
    train: TrainConfig
    fp8: FP8Config = FP8Config()
    attention: AttentionConfig = AttentionConfig()
    parallel: ParallelConfig = ParallelConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    eval: EvalConfig = EvalConfig()
    log: LogConfig = LogConfig()
    deepspeed: Annotated[dict[str, Any], AfterValidator(check_deepspeed), OnResume.FREE] = {}
    """Merged over the generated DeepSpeed JSON; keys that this file owns are refused."""

    def rules(self) -> Iterator[Problem]:
        yield from _rules_between(dict(self))

    @property
    def clips_apart(self) -> bool:
        return layout.clips_apart(self)

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists and numbers, every default filled in."""
        return self.model_dump(mode="json")

    def to_yaml(self) -> str:
        """YAML that load_config reads back into an equal Config."""
        return dump_tree(self.to_dict())


def _rules_between(sections: Mapping[str, Any]) -> Iterator[Problem]:
    """Rules between sections, as far as they parsed."""
    model, mtp, data, train = (sections.get(name) for name in ("model", "mtp", "data", "train"))
    if model and data and data.seq_len > model.max_position_embeddings:
        text = f"must be <= model.max_position_embeddings = {model.max_position_embeddings}"
        yield "data.seq_len", f"{text} (got {data.seq_len})"
    if model and data and data.task:
        yield from _task_fits(model, data.task)
    if train and data and train.total_tokens < (step := train.batch_size * data.seq_len):
        text = f"must be >= one step, train.batch_size * data.seq_len = {step}"
        yield "train.total_tokens", f"{text} (got {train.total_tokens})"
    if train and mtp and train.freeze == "trunk":
        if not mtp.depths:
            yield (
                "train.freeze",
                "trunk leaves nothing to train without MTP heads; set none, or mtp.mode",
            )
        elif mtp.detach == "none":
            yield "train.freeze", "trunk needs mtp.detach: trunk or all (got none)"
        if mtp.depths and _never_weighed(mtp):
            text = "is 0 from start to end, and with train.freeze: trunk only the heads learn"
            yield "mtp.loss_weight", f"{text}; give it a positive value"
        if train.init_from is None:
            yield (
                "train.freeze",
                "trunk needs train.init_from: a trunk at random weights teaches nothing",
            )

    if all(sections.get(name) is not None for name in layout.NEEDS):
        yield from layout.problems(SimpleNamespace(**sections))


def _never_weighed(mtp: MTPConfig) -> bool:
    """No head has a weight in the loss at any time."""
    from dsv3_mtp.config.schedules import depth_loss_weights  # which needs the sections

    return not any(any(depth_loss_weights(mtp, step / 1000)) for step in range(1001))


def _task_fits(model: ModelConfig, task: Task) -> Iterator[Problem]:
    if model.vocab_size < task.vocab_size:
        text = f"must be >= {task.vocab_size}, the tokens of data.task.type {task.type}"
        yield "model.vocab_size", f"{text} (got {model.vocab_size})"
    if model.max_position_embeddings < task.example_length:
        text = f"must be >= {task.example_length}, the length of an example of data.task"
        yield "model.max_position_embeddings", f"{text} (got {model.max_position_embeddings})"


WHOLE = ("mtp.objective",)  # {kl: 1} over a base's {ce: 1} is kl alone


def load_config(
    path: str | Path, sets: Iterable[str] = (), *, trust_code: bool | Collection[str] = True
) -> Config:
    """Reads and checks a run's YAML. sets: overrides such as "mtp.mode=none", values in YAML,
    applied first.

    trust_code: import what the file names as package.module:Class; or which of these names. True
        only for a file that the user has named as a config, not for one found in a run folder.

    Raises ConfigError, whose text is a report of every problem in the file and in the overrides.
    """
    document = read_document(path, sets, whole=WHOLE)
    if trust_code is not True:
        code.refuse(str(path), document.tree, trust_code or ())
    _drop_unused(document)
    tree, problems = document.tree, document.problems
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        found = problems_of(error, tree, Config)
        more = [*_rules_between(_parsed(tree)), *_option_problems(tree.get("mtp"))]
        found += [problem for problem in more if problem not in found]
        problems += map(document.traced, found)
    if problems:
        raise ConfigError(str(path), problems)
    return config


def _option_problems(section: Any) -> Iterator[Problem]:
    """What is wrong with the options of the heads in a faulty `mtp` section."""
    given = section if isinstance(section, Mapping) else {}
    extra = {key: value for key, value in given.items() if key not in MTPConfig.model_fields}
    with suppress(ValueError, TypeError):  # of an unknown mode, which is reported
        for key, text in option_problems(given.get("mode", MTPConfig().mode), extra):
            more = did_you_mean(f"mtp.{key}", key_paths(Config)) if text == UNKNOWN else ""
            yield f"mtp.{key}", text + more


def _drop_unused(document: Document) -> None:
    """Takes out what is said of heads that this run has not, and says so: keys of another kind at
    their defaults, and those that a base has set.

    Such a key of another value beside the mode, or by --set, is an error: `option_problems`.
    """
    mtp = document.tree.get("mtp")
    if not isinstance(mtp, dict):
        return
    mode = mtp.get("mode", MTPConfig.model_fields["mode"].default)
    try:
        unused = unused_keys(mode)
    except (ValueError, TypeError):  # of an unknown mode, which is reported
        return
    keys, default_keys = [], []
    for key, default in unused.items():
        if key not in mtp:
            continue
        if document.inherited(f"mtp.{key}", beside="mtp.mode") and mtp[key] != default:
            origin = document.origin(f"mtp.{key}")
            _LOG.warning(
                "mtp.%s: %s of %s has no effect with mode %s: left out",
                *(key, show(mtp[key]), origin, mode),
            )
            keys.append(key)
        elif mtp[key] == default and key not in MTPConfig.model_fields:
            default_keys.append(f"mtp.{key}")
    if default_keys:
        _LOG.info("%s: left out, mode %s has no such key", ", ".join(default_keys), mode)
    document.tree["mtp"] = {key: value for key, value in mtp.items() if key not in keys}


def _parsed(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The sections of a faulty tree that are valid on their own."""
    sections = {}
    for name, field in Config.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            with suppress(ValidationError):
                sections[name] = field.annotation.model_validate(tree.get(name))
    return sections
