"""The runs that a study stands for: their budgets, and which of them share a prefix.

for run in expand(load_study("configs/studies/lambda.yaml"), budgets={}): print(run.name,
run.parent, run.fork_step)
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from dsv3_mtp.config import AdaptiveSchedule, Config, ModelConfig, MTPConfig, schedules
from dsv3_mtp.config.resume import differences
from dsv3_mtp.model.causal_lm import meta_model
from dsv3_mtp.model.size import ModelSize, model_size
from dsv3_mtp.study.load import LoadedStudy
from dsv3_mtp.study.matrix import Study

# A run is a pure function of what these are at each step: arms that differ in nothing else may
# share a prefix.
SCHEDULED = (
    *("mtp.loss_weight", "mtp.depth_weights", "mtp.curriculum", "optim.lr", "optim.schedule"),
    *("train.bias_update_speed", "train.bias_update_until"),
    *("train.batch_size_ramp", "train.total_tokens"),
)


@dataclass(frozen=True)
class Run:
    """One run of the matrix."""

    arm: str
    seed: int
    config: Config
    parent: str | None = None  # name of the run whose checkpoint it goes on from
    fork_step: int = 0  # the step of that checkpoint

    @property
    def name(self) -> str:
        return self.config.run.name


def expand(loaded: LoadedStudy, budgets: Mapping[str, int]) -> list[Run]:
    """The runs, seed by seed, parents before the runs that fork from them.

    budgets: total_tokens of the arms that match another's measured time; such an arm is left out
        until it is known.
    """
    study = loaded.study
    configs: dict[str, Config] = {}
    parents: dict[str, tuple[str | None, int]] = {}
    for name in study.arms:
        tokens = tokens_of(loaded, name, budgets)
        if tokens is not None:
            config = _replace(loaded.configs[name], train={"total_tokens": tokens})
            parents[name] = _best_parent(config, configs)
            configs[name] = config
    forked = {parent for parent, _ in parents.values()}
    runs = []
    for seed in study.seeds:
        for name, config in configs.items():
            # a run that others fork from keeps every checkpoint until all have taken theirs
            keep = 2 + steps_of(config) if name in forked else config.checkpoint.keep
            run = {"name": f"{name}-seed{seed}", "seed": seed}
            own = _replace(config, run=run, checkpoint={"keep": keep}, log=_grouped(config, study))
            parent, step = parents[name]
            runs.append(Run(name, seed, own, f"{parent}-seed{seed}" if parent else None, step))
    return runs


def _grouped(config: Config, study: Study) -> dict[str, Any]:
    """What `log` says of the runs of a study: in W&B they are a group of its name."""
    wandb = config.log.wandb
    if wandb is None or wandb.group is not None:
        return {}
    return {"wandb": wandb.model_dump() | {"group": study.run.name}}


def _replace(config: Config, **sections: Mapping[str, Any]) -> Config:
    tree = config.to_dict()
    for name, values in sections.items():
        tree[name] |= values
    return Config.model_validate(tree)


def tokens_of(loaded: LoadedStudy, name: str, budgets: Mapping[str, int]) -> int | None:
    """train.total_tokens of an arm; None while it depends on a time that has not been measured."""
    match, config = loaded.study.arms[name].match, loaded.configs[name]
    if match is None:
        return config.train.total_tokens
    if match.by == "cpu_time":
        return budgets.get(name)
    other_tokens = tokens_of(loaded, match.arm, budgets)
    if other_tokens is None:
        return None
    other = _replace(loaded.configs[match.arm], train={"total_tokens": other_tokens})
    return whole_steps(config, training_flops(other) / size_of(config).flops_per_token)


def whole_steps(config: Config, tokens: float) -> int:
    """`tokens` rounded to whole optimizer steps, at least one."""
    step = config.train.batch_size * config.data.seq_len
    return max(1, round(tokens / step)) * step


@cache
def _size(model: ModelConfig, mtp: MTPConfig, seq_len: int, freeze: str) -> ModelSize:
    return model_size(meta_model(model, mtp, freeze=freeze), seq_len)


def size_of(config: Config) -> ModelSize:
    return _size(config.model, config.mtp, config.data.seq_len, config.train.freeze)


def steps_of(config: Config) -> int:
    """Optimizer steps of a run in one process."""
    return schedules.total_steps(config.train, config.data.seq_len, config.train.micro_batch_size)


def consumed(config: Config) -> int:
    """Tokens that a run consumes: whole steps, so up to one step more than train.total_tokens."""
    *_, last = _steps(config)
    return last.tokens


def training_flops(config: Config) -> float:
    return size_of(config).flops_per_token * consumed(config)


def _best_parent(config: Config, others: Mapping[str, Config]) -> tuple[str | None, int]:
    """The arm that shares the longest prefix, and its last checkpoint in this prefix."""
    parent, best = None, 0
    for name, other in others.items():
        shared, every = shared_steps(config, other), other.checkpoint.every
        step = min(shared, steps_of(config) - 1, steps_of(other) - 1) // every * every
        if step > best:
            parent, best = name, step
    return parent, best


def shared_steps(a: Config, b: Config) -> int:
    """How many of the first steps of two runs are the same, number for number, in one process."""
    free = ("run.name", "run.dir", "log", "checkpoint", "train.threads")
    if differences(a.to_dict(), b.to_dict(), ignoring=(*SCHEDULED, *free)):
        return 0
    # its lambda depends on what the run measures, not on the config alone
    if any(isinstance(run.mtp.loss_weight, AdaptiveSchedule) for run in (a, b)):
        return 0
    count = 0
    for left, right in zip(_steps(a), _steps(b), strict=False):
        if left != right:
            break
        count += 1
    return count


def _steps(config: Config) -> Iterator[schedules.ScheduledStep]:
    """All steps of a run in one process."""
    tokens = 0
    while tokens < config.train.total_tokens:
        step = schedules.coming_step(config, tokens, config.train.micro_batch_size)
        tokens = step.tokens
        yield step
