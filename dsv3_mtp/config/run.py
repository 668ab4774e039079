"""The whole of a run, its small sections, and the rules between sections.

"V3" is arXiv 2412.19437. Unknown keys and settings without effect are errors.
"""

from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from dsv3_mtp.config import layout
from dsv3_mtp.config.data import DataConfig, Task
from dsv3_mtp.config.deepspeed import check_deepspeed
from dsv3_mtp.config.model import ModelConfig
from dsv3_mtp.config.mtp import MTPConfig
from dsv3_mtp.config.precision import AttentionConfig, FP8Config
from dsv3_mtp.config.reader import Problem
from dsv3_mtp.config.schedules import depth_loss_weights
from dsv3_mtp.config.section import (
    Boolean,
    Count,
    FilePath,
    FolderName,
    Integer,
    NotNegativeCount,
    Number,
    OnResume,
    Section,
    Text,
    not_bool,
)
from dsv3_mtp.config.training import OptimConfig, TrainConfig
from dsv3_mtp.config.tree import dump_tree


class RunConfig(Section):
    """Where the run lives and what it draws its random numbers from."""

    on_resume = OnResume.FREE

    name: FolderName = "run"
    """The run's folder is DIR/NAME."""
    dir: FilePath = "runs"
    """Folder of all runs."""
    seed: Annotated[Integer, Field(ge=0, lt=2**63), OnResume.FIXED] = 1234
    """Initialisation and data order."""


class ParallelConfig(Section):
    """How ranks share the work."""

    on_resume = OnResume.FREE

    zero_stage: Annotated[Literal[0, 1, 2, 3], BeforeValidator(not_bool)] = 1
    """DeepSpeed ZeRO: 1 shards optimizer states (V3 3.1), 2 also gradients, 3 also weights."""
    offload_optimizer: Boolean = False
    """Keep optimizer states and master weights in host memory, and update there (ZeRO 1, 2, 3)."""
    expert_parallel_size: Count = 1
    """Ranks that share the routed experts of a layer; their groups are copies (V3 3.2: 64)."""
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

    every: NotNegativeCount = 100
    """Steps between validations; 0: only at the end."""
    batches: Count = 16
    """Batches of micro_batch_size sequences, over all ranks."""


class WandbConfig(Section):
    """Weights & Biases: docs/monitors.md."""

    project: Text
    """Project there."""
    entity: Text | None = None
    """User or team; null: W&B's default for this login."""
    group: Text | None = None
    """Group of the run; null: none, and for a run of a study the study's name."""
    tags: tuple[Text, ...] = ()
    """Tags beside the kind of heads, D and the type of lambda's schedule."""


class LogConfig(Section):
    """What is written besides metrics.jsonl."""

    on_resume = OnResume.FREE

    every: Count = 10
    """Steps between lines."""
    tensorboard: Boolean = True
    """Write event files to the run's tb folder."""
    wandb: WandbConfig | None = None
    """null: off."""
    gradients: NotNegativeCount = 0
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
        yield from rules_between(dict(self))

    @property
    def clips_apart(self) -> bool:
        return layout.clips_apart(self)

    def replace(self, key: str, value: Any) -> "Config":
        """A config with another value under a dotted key, checked as a file of its own would be:
        `config.replace("mtp.loss_weight", 0.1)`. What differs by more keys, which are only valid
        together, is written to `load_config(path, [...])`.

        Raises:
            ConfigError: as `load_config`.
        """
        from dsv3_mtp.config.load import replaced  # which makes a Config

        return replaced(self, key, value)

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists and numbers, every default filled in."""
        return self.model_dump(mode="json")

    def to_yaml(self) -> str:
        """YAML that load_config reads back into an equal Config."""
        return dump_tree(self.to_dict())


def rules_between(sections: Mapping[str, Any]) -> Iterator[Problem]:
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
            text = "trunk leaves nothing to train without MTP heads; set none, or mtp.mode"
            yield "train.freeze", text
        elif model and not mtp.kind.has_weights(model, mtp):
            text = f"trunk leaves nothing to train: mode {mtp.mode} has no weights of its own"
            yield "train.freeze", f"{text}; set none, or another mtp.mode"
        elif mtp.detach == "none":
            yield "train.freeze", "trunk needs mtp.detach: trunk or all (got none)"
        if mtp.depths and _never_weighed(mtp):
            text = "is 0 from start to end, and with train.freeze: trunk only the heads learn"
            yield "mtp.loss_weight", f"{text}; give it a positive value"
        if train.init_from is None:
            text = "trunk needs train.init_from: a trunk at random weights teaches nothing"
            yield "train.freeze", text

    if all(sections.get(name) is not None for name in layout.NEEDS):
        yield from layout.problems(SimpleNamespace(**sections))


def _never_weighed(mtp: MTPConfig) -> bool:
    """No head has a weight in the loss at any time."""
    if any(mtp.kind.terms(mtp).values()):  # losses that the heads own
        return False
    return not any(any(depth_loss_weights(mtp, step / 1000)) for step in range(1001))


def _task_fits(model: ModelConfig, task: Task) -> Iterator[Problem]:
    if model.vocab_size < task.vocab_size:
        text = f"must be >= {task.vocab_size}, the tokens of data.task.type {task.type}"
        yield "model.vocab_size", f"{text} (got {model.vocab_size})"
    if model.max_position_embeddings < task.example_length:
        text = f"must be >= {task.example_length}, the length of an example of data.task"
        yield "model.max_position_embeddings", f"{text} (got {model.max_position_embeddings})"
