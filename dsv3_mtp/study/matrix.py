"""The keys of a study file: a base run, arms that change settings of it, seeds, what is compared.

The file says beforehand what is asked, what is expected and which one metric decides; everything
else is exploratory. load.py reads it; docs/study.md is the reference.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from dsv3_mtp.config import Config
from dsv3_mtp.config.reader import Problem, show
from dsv3_mtp.config.section import (
    Count,
    FilePath,
    FolderName,
    Fraction,
    Integer,
    Number,
    Positive,
    Section,
    Text,
)
from dsv3_mtp.study.metric_names import NEEDS, OWN, is_rate_over_seeds, not_measured
from dsv3_mtp.study.trend_key import Trend, trend_rules

EVERY_ARM = "every arm"

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
    """flops: training FLOPs, by count; cpu_time: seconds of computing in finished runs of `arm`."""
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


class Axis(Section):
    """One setting that a grid varies."""

    key: Text
    """Dotted key of the run's config."""
    values: (
        Annotated[dict[Text, Any], Field(min_length=1)] | Annotated[list[Any], Field(min_length=1)]
    )
    """A list (arms are called AXISVALUE), or a mapping of names to values (called NAME)."""


class Grid(Section):
    """Arms beside those of `arms`: all combinations of the axes' values, such as lambda0.1_D2."""

    about: Text = "of the grid"
    set: Overrides = {}
    axes: Annotated[dict[Text, Axis], Field(min_length=1)]


class Expected(Section):
    """What a comparison is expected to show in one metric, written before the runs."""

    effect: Number | dict[Text, Number] | None = None
    """Arm minus the arm compared with, in units of the metric, for all arms or one number per arm.
    0: equal, within +-margin. null: not said."""
    sd: Positive | None = None
    """Standard deviation of the paired differences over seeds. A solve rate needs none."""
    source: Text
    """Where the numbers come from: a pilot, a paper."""

    def effect_of(self, arm: str) -> float | None:
        return self.effect.get(arm) if isinstance(self.effect, dict) else self.effect


# What makes a comparison fair: heads on top (V3), heads instead of trunk layers (Meta), equal cost,
# other heads on the same trunk, or other settings of the same model.
Matched = Literal["matched parameters", "matched training FLOPs", "matched CPU time"]
Rule = Literal["added parameters", Matched, "same trunk", "same model"]


class Comparison(Section):
    """Arms against one other arm, paired by seed."""

    against: Text
    arms: Annotated[tuple[Text, ...], Field(min_length=1)]
    """Names, or patterns with * that stand for every arm they fit but `against`."""
    rule: Rule
    expected: dict[Text, Expected] = {}
    """Metric -> what is expected of it; shown beside what can be found."""


class LearningRate(Section):
    """For whom the learning rate was chosen: an arm that got its own has an advantage."""

    tuned_for: Text
    """An arm, or `every arm`: swept for each."""
    source: Text
    """How it was found."""


class Primary(Section):
    """The one metric and comparison that decide; declared before the runs."""

    metric: Text
    comparison: Text
    margin: Positive
    """The equivalence test's bound: differences within +-margin would not matter."""


class AcceptanceSection(Section):
    """Free-running drafts on prefixes of validation text after training, at temperature 0 and 1."""

    prefixes: Count = 64
    prefix_tokens: Count = 64
    new_tokens: Annotated[Integer, Field(ge=3)] = 16
    """The first comes with the prompt, the last of a step from the main model: without a draft."""
    draws: Count = 4
    """Sets that the prefixes are dealt to, each with random numbers of its own, for an sd."""

    def rules(self) -> Iterator[Problem]:
        if self.draws > self.prefixes:
            yield "draws", f"must be <= prefixes = {self.prefixes} (got {self.draws})"


class StudyScale(Section):
    """One size of the study, chosen with --set scale=NAME."""

    base: FilePath
    """Run config that every arm starts from, relative to the study file."""
    set: Overrides = {}
    flops_per_s: Positive
    """Training FLOP/s of one process: turns FLOPs into the time that --dry-run foretells."""
    ranks: Count = 1
    """Processes of every run, on one host: what `parallel` lays out."""


class Study(Section):
    """The whole file."""

    run: StudyRun
    question: Text
    expectation: Text
    """Written before the runs, and printed beside the outcome."""
    set: Overrides = {}
    """Settings of every arm, on top of the scale's."""
    scale: Text = "cpu"
    scales: Annotated[dict[Text, StudyScale], Field(min_length=1)]
    seeds: Annotated[tuple[Annotated[Integer, Field(ge=0, lt=2**63)], ...], Field(min_length=1)]
    arms: Annotated[dict[Text, Arm], Field(min_length=1)]
    grid: Grid | None = None
    comparisons: Annotated[dict[Text, Comparison], Field(min_length=1)]
    trends: dict[Text, Trend] = {}
    """Effects that are followed over several comparisons."""
    primary: Primary
    metrics: tuple[Text, ...] = ()
    """Exploratory metrics, beside the primary one."""
    acceptance: AcceptanceSection | None = None
    """null: not measured."""
    loss_error_against: Text | None = None
    """Arm whose training losses train/main_loss_error is relative to (V3 B.1); null: not asked."""
    solve_threshold: Fraction | None = None
    """task/exact_match of a validation from which on a run has solved its task; null: not asked."""
    corpus: Text | None = None
    """Manifest hash, or its beginning, of the prepared text of the study's numbers; null: any."""
    learning_rate: LearningRate | None = None
    """null: the report says that this is not known."""
    limits: Text | None = None
    """What the study does not show, in the author's words; the report adds what it knows itself."""

    def rules(self) -> Iterator[Problem]:
        if self.scale not in self.scales:
            yield "scale", f"must be one of {', '.join(self.scales)} (got {show(self.scale)})"
        if len(set(self.seeds)) != len(self.seeds):
            yield "seeds", f"must differ (got {show(self.seeds)})"
        if (decides := self.primary.comparison) not in self.comparisons:
            names = ", ".join(self.comparisons)
            yield "primary.comparison", f"must be one of {names} (got {show(decides)})"
        if (other := self.loss_error_against) not in (None, *self.arms):
            names = ", ".join(self.arms)
            yield "loss_error_against", f"must be one of {names} (got {show(other)})"
        for place, overrides in self.overrides():
            for key in overrides:
                if key in OWNED:
                    text = "is given by the study: use run, seeds and the names of the arms"
                    yield f"{place}.{key}", text
                elif key in Config.model_fields and key != "deepspeed":
                    text = "is a whole section, whose other keys would no longer be the base's"
                    yield f"{place}.{key}", f"{text}; give dotted keys, '{key}.KEY: VALUE'"
        yield from self._name_rules()
        yield from trend_rules(self.trends, self.comparisons)
        yield from self._metric_rules()

    def _name_rules(self) -> Iterator[Problem]:
        earlier: list[str] = []
        for name, arm in self.arms.items():
            if not name.replace("_", "").replace(".", "").isalnum():
                yield f"arms.{name}", "names are letters, digits, dots and underscores"
            for role in ("arm", "pace") if arm.match else ():
                other = getattr(arm.match, role)
                if other is not None and other not in earlier:
                    text = f"must be an arm above it (got {show(other)})"
                    yield f"arms.{name}.match.{role}", text
            earlier.append(name)
        for name, comparison in self.comparisons.items():
            for arm_name in (comparison.against, *comparison.arms):
                if arm_name not in self.arms:
                    yield f"comparisons.{name}", f"there is no arm {show(arm_name)}"
            if comparison.against in comparison.arms:
                yield f"comparisons.{name}", f"compares {show(comparison.against)} with itself"
            if len(set(comparison.arms)) != len(comparison.arms):
                yield f"comparisons.{name}.arms", f"must differ (got {show(comparison.arms)})"
            yield from self._expected_rules(name, comparison)
        if self.learning_rate and self.learning_rate.tuned_for not in (EVERY_ARM, *self.arms):
            text = f"must be an arm, or '{EVERY_ARM}' (got {show(self.learning_rate.tuned_for)})"
            yield "learning_rate.tuned_for", text

    def _expected_rules(self, name: str, comparison: Comparison) -> Iterator[Problem]:
        for metric, expected in comparison.expected.items():
            place = f"comparisons.{name}.expected.{metric}"
            if metric not in (self.primary.metric, *self.metrics):
                text = "is neither primary.metric nor one of `metrics`: it would not be tested"
                yield place, text
            if isinstance(expected.effect, dict):
                for arm in sorted(set(expected.effect) - set(comparison.arms)):
                    yield f"{place}.effect.{arm}", "is no arm of this comparison"
            if expected.effect is None and expected.sd is None:
                yield place, "says neither effect nor sd"
            if expected.sd is not None and is_rate_over_seeds(metric):
                yield f"{place}.sd", "has no use: a solve rate is tested by counting seeds"

    def asked(self) -> list[tuple[str, str]]:
        """Every metric that the file names, with its place."""
        listed = [(f"metrics[{number}]", metric) for number, metric in enumerate(self.metrics)]
        return [("primary.metric", self.primary.metric), *listed]

    def _metric_rules(self) -> Iterator[Problem]:
        for place, metric in self.asked():
            needed = [key for prefix, key in NEEDS.items() if metric.startswith(prefix)]
            if needed and getattr(self, needed[0]) is None:
                only = f"is measured only with {needed[0]}; set that too (got {show(metric)})"
                yield place, only
            elif not OWN.fullmatch(metric) and (text := not_measured(metric)):
                yield place, text

    def tests(self) -> list[tuple[str, str, str, bool]]:
        """(comparison, metric, arm, whether it is primary) of all tests, the primary ones first."""
        decides = (self.primary.comparison, self.primary.metric)
        found = [
            (name, metric, arm, (name, metric) == decides)
            for name, comparison in self.comparisons.items()
            for metric in dict.fromkeys([self.primary.metric, *self.metrics])
            for arm in comparison.arms
        ]
        return sorted(found, key=lambda test: not test[3])

    def overrides(self) -> list[tuple[str, Overrides]]:
        """Every `set` of the file and its place."""
        places = [("set", self.set)]
        places += [(f"scales.{name}.set", scale.set) for name, scale in self.scales.items()]
        if self.grid:
            places.append(("grid.set", self.grid.set))
        return places + [(f"arms.{name}.set", arm.set) for name, arm in self.arms.items()]

    @property
    def ranks(self) -> int:
        """Processes of a run."""
        return self.scales[self.scale].ranks

    @property
    def folder(self) -> Path:
        return Path(self.run.dir) / self.run.name
