"""A study file: one base run, arms that change settings of it, seeds, and what is compared with
what.

    loaded = load_study("configs/studies/lambda.yaml", ["seeds=[1, 2]"])
    loaded.study.arms, loaded.configs["v3_step"].mtp.loss_weight

The file says beforehand what is asked, what is expected and which one metric decides; everything
else is exploratory.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from dsv3_mtp.config import Config, ConfigError, layout, load_config
from dsv3_mtp.config.reader import Problem, problems_of, show
from dsv3_mtp.config.section import (
    Count,
    FilePath,
    FolderName,
    Fraction,
    Integer,
    Positive,
    Section,
    Text,
)
from dsv3_mtp.config.tree import read_tree
from dsv3_mtp.study.metric_names import METRICS, NEEDS, family

Overrides = dict[Text, Any]
OWNED = ("run", "run.name", "run.dir", "run.seed")  # settings that the study gives to each run


class StudyRun(Section):
    """Where the study lives: its folder is DIR/NAME, and holds one run folder per arm and seed."""

    name: FolderName
    dir: FilePath = "runs"


class Match(Section):
    """Gives an arm the budget of another: total_tokens follows from it."""

    arm: Text
    """The arm whose cost is matched."""
    by: Literal["flops", "cpu_time"]
    """flops: training FLOPs, by count; cpu_time: seconds of computing, as measured in the finished
    runs of `arm`.
    """
    pace: Text | None = None
    """With cpu_time: the arm whose measured tokens per second this arm has."""

    def rules(self) -> Iterator[Problem]:
        if (self.pace is None) == (self.by == "cpu_time"):
            yield "pace", f"is needed with by: cpu_time, and only there (got {show(self.pace)})"


class Arm(Section):
    """One kind of run: settings that differ from the base."""

    about: Text
    """What it is, in a few words for the report."""
    set: Overrides = {}
    """Dotted keys of the run's config and their values."""
    match: Match | None = None
    """null: train.total_tokens as the base has it."""

    def rules(self) -> Iterator[Problem]:
        if self.match and "train.total_tokens" in self.set:
            yield "set.train.total_tokens", "follows from 'match'; remove one of them"


class Comparison(Section):
    """Arms against one other arm, paired by seed."""

    against: Text
    arms: Annotated[tuple[Text, ...], Field(min_length=1)]
    rule: Literal[
        "added parameters",
        "matched parameters",
        "matched training FLOPs",
        "matched CPU time",
        "same trunk",
        "same model",
    ]
    """What makes it fair: heads on top (V3), heads instead of trunk layers (Meta), equal cost,
    other heads on the same trunk, or other settings of the same model.
    """


class Primary(Section):
    """The one metric and comparison that decide; declared before the runs."""

    metric: Text
    comparison: Text
    margin: Positive
    """Differences within +-margin would not matter: the equivalence test's bound, in units of the
    metric.
    """


class Acceptance(Section):
    """Free-running drafts on prefixes of real validation text, after training, at temperature 0 and
    1.
    """

    prefixes: Count = 64
    prefix_tokens: Count = 64
    new_tokens: Annotated[Integer, Field(ge=3)] = 16
    """The first comes with the prompt, and the last of a step from the main model: two have nothing
    to draft.
    """


class Scale(Section):
    """One size of the study, chosen with --set scale=NAME."""

    base: FilePath
    """Run config that every arm starts from, relative to the study file."""
    set: Overrides = {}
    flops_per_s: Positive
    """Training FLOP/s of one worker: turns FLOPs into the time that --dry-run foretells."""


class Study(Section):
    """The whole file."""

    run: StudyRun
    question: Text
    expectation: Text
    """Written before the runs, and printed beside the outcome."""
    set: Overrides = {}
    """Settings of every arm, on top of the scale's."""
    scale: Text = "cpu"
    scales: Annotated[dict[Text, Scale], Field(min_length=1)]
    seeds: Annotated[tuple[Annotated[Integer, Field(ge=0, lt=2**63)], ...], Field(min_length=1)]
    arms: Annotated[dict[Text, Arm], Field(min_length=1)]
    comparisons: Annotated[dict[Text, Comparison], Field(min_length=1)]
    primary: Primary
    metrics: tuple[Text, ...] = ()
    """Exploratory metrics, beside the primary one."""
    acceptance: Acceptance | None = None
    """null: not measured."""
    loss_error_against: Text | None = None
    """Arm whose training losses are the reference of train/main_loss_error and its like (V3 B.1);
    null: not asked.
    """
    solve_threshold: Fraction | None = None
    """A run has solved its task at the first validation whose task/exact_match reaches this; null:
    not asked.
    """

    def rules(self) -> Iterator[Problem]:
        if self.scale not in self.scales:
            yield "scale", f"must be one of {', '.join(self.scales)} (got {show(self.scale)})"
        if len(set(self.seeds)) != len(self.seeds):
            yield "seeds", f"must differ (got {show(self.seeds)})"
        if self.primary.comparison not in self.comparisons:
            names = ", ".join(self.comparisons)
            yield (
                "primary.comparison",
                f"must be one of {names} (got {show(self.primary.comparison)})",
            )
        if self.loss_error_against not in (None, *self.arms):
            yield (
                "loss_error_against",
                f"must be one of {', '.join(self.arms)} (got {show(self.loss_error_against)})",
            )
        for place, overrides in self.overrides():
            for key in overrides:
                if key in OWNED:
                    yield (
                        f"{place}.{key}",
                        "is given by the study: use run, seeds and the names of the arms",
                    )
                elif key in Config.model_fields and key != "deepspeed":
                    text = "is a whole section, whose other keys would no longer be the base's"
                    yield f"{place}.{key}", f"{text}; give dotted keys, '{key}.KEY: VALUE'"
        yield from self._name_rules()
        yield from self._metric_rules()

    def _name_rules(self) -> Iterator[Problem]:
        earlier: list[str] = []
        for name, arm in self.arms.items():
            if not name.replace("_", "").replace(".", "").isalnum():
                yield f"arms.{name}", "names are letters, digits, dots and underscores"
            for role, other in (
                ("arm", arm.match and arm.match.arm),
                ("pace", arm.match and arm.match.pace),
            ):
                if other is not None and other not in earlier:
                    yield (
                        f"arms.{name}.match.{role}",
                        f"must be an arm above it (got {show(other)})",
                    )
            earlier.append(name)
        for name, comparison in self.comparisons.items():
            for arm_name in (comparison.against, *comparison.arms):
                if arm_name not in self.arms:
                    yield f"comparisons.{name}", f"there is no arm {show(arm_name)}"
            if comparison.against in comparison.arms:
                yield f"comparisons.{name}", f"compares {show(comparison.against)} with itself"
            if len(set(comparison.arms)) != len(comparison.arms):
                yield f"comparisons.{name}.arms", f"must differ (got {show(comparison.arms)})"

    def _metric_rules(self) -> Iterator[Problem]:
        listed = [(f"metrics[{number}]", metric) for number, metric in enumerate(self.metrics)]
        for place, metric in [("primary.metric", self.primary.metric), *listed]:
            name, key = (
                family(metric),
                next((key for prefix, key in NEEDS.items() if metric.startswith(prefix)), None),
            )
            if name not in METRICS:
                close = get_close_matches(name, METRICS, n=1)
                hint = (
                    f"; did you mean '{close[0]}'?"
                    if close
                    else f"; there are {', '.join(METRICS)}"
                )
                yield place, f"no run is measured by it (got {show(metric)}){hint}"
            elif key and getattr(self, key) is None:
                yield place, f"is measured only with {key}; set that too (got {show(metric)})"

    def overrides(self) -> list[tuple[str, Overrides]]:
        """Every `set` of the file and its place."""
        places = [("set", self.set)]
        places += [(f"scales.{name}.set", scale.set) for name, scale in self.scales.items()]
        return places + [(f"arms.{name}.set", arm.set) for name, arm in self.arms.items()]

    @property
    def folder(self) -> Path:
        return Path(self.run.dir) / self.run.name


@dataclass(frozen=True)
class LoadedStudy:
    """A valid study and the config of each arm, for the first seed and before budgets are
    matched.
    """

    study: Study
    path: Path
    sets: tuple[str, ...]
    configs: dict[str, Config]


def load_study(path: str | Path, sets: Iterable[str] = ()) -> LoadedStudy:
    """Reads and checks a study file and every arm's config.

    sets: overrides of the file, such as "scale=gpu", or of the run that all arms start from, such
    as "optim.lr=1e-3". Raises ConfigError, whose text reports every problem of the study and of its
    arms.
    """
    path, sets = Path(path), tuple(sets)
    # of a run, that are not keys of a study file too
    sections = set(Config.model_fields) - set(Study.model_fields)
    of_runs = [item for item in sets if item.partition("=")[0].partition(".")[0] in sections]
    tree, problems = read_tree(path, [item for item in sets if item not in of_runs])
    try:
        study = Study.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(str(path), problems + problems_of(error, tree, Study)) from None
    found: dict[Problem, list[str]] = {}
    configs, base = {}, path.parent / study.scales[study.scale].base
    read_tree(base)  # a base that cannot be read is no problem of the arms
    for name in study.arms:
        try:
            configs[name] = load_config(base, list(_settings(study, name, of_runs)))
            # a run of a study is one process
            refused = list(layout.problems(configs[name], world_size=1))
        except ConfigError as error:
            refused = list(error.problems)
        for problem in refused:
            found.setdefault(problem, []).append(name)
    problems += _measuring_problems(study, configs)
    for (key, text), arms in found.items():
        where = "every arm" if len(arms) == len(study.arms) else f"arms.{', '.join(arms)}"
        problems.append((f"{where}: {key}", text))
    if problems:
        raise ConfigError(str(path), problems)
    return LoadedStudy(study, path, sets, configs)


def _measuring_problems(study: Study, configs: Mapping[str, Config]) -> Iterator[Problem]:
    """What the study asks to be measured, and runs of these configs could not be."""
    coarse = [name for name, config in configs.items() if config.log.every > 1]
    if study.loss_error_against is not None and coarse:
        yield (
            f"arms.{', '.join(coarse)}: log.every",
            "must be 1 with loss_error_against: it is smoothed by step",
        )
    texts = [
        name
        for name, config in configs.items()
        if config.data.task is None or not config.data.task.has_answers
    ]
    if study.solve_threshold is not None and texts:
        yield (
            "solve_threshold",
            f"needs a data.task with answers, which arms.{', '.join(texts)} have not; set null",
        )
    if study.acceptance is not None:
        needed = study.acceptance.prefix_tokens + study.acceptance.new_tokens
        for name in texts:
            longest = configs[name].model.max_position_embeddings
            if configs[name].mtp.depths and needed > longest:
                text = (
                    "prefix_tokens + new_tokens must be <= "
                    f"model.max_position_embeddings = {longest} of arms.{name}"
                )
                yield "acceptance", f"{text} (got {needed})"


def _settings(study: Study, name: str, of_runs: Iterable[str]) -> Iterator[str]:
    """What load_config is to override in the base for an arm's first seed: later ones win."""

    # default: a date, which no key takes, is refused as text
    def items(overrides: Overrides) -> Iterator[str]:
        yield from (
            f"{key}={json.dumps(value, ensure_ascii=False, default=str)}"
            for key, value in overrides.items()
        )

    own = {
        "run.name": f"{name}-seed{study.seeds[0]}",
        "run.dir": str(study.folder),
        "run.seed": study.seeds[0],
    }
    for overrides in (study.scales[study.scale].set, study.set):
        yield from items(overrides)
    yield from of_runs
    yield from items(study.arms[name].set | own)
