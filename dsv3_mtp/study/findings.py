"""From the results of all runs to effects. No words, no drawing, no layout."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from dsv3_mtp.report.metrics import LEAK_RATIO
from dsv3_mtp.study import stats
from dsv3_mtp.study.archive import RunRecord, Table
from dsv3_mtp.study.load import LoadedStudy
from dsv3_mtp.study.matrix import Study
from dsv3_mtp.study.metric_names import is_rate_over_seeds
from dsv3_mtp.study.plan import Plan
from dsv3_mtp.study.power import Detectable
from dsv3_mtp.study.stats import Interval

ALPHA = 0.05
FEWEST = 3  # seeds below which nothing is concluded
LOSS = "val/main_loss"


@dataclass(frozen=True)
class Effect:
    """One metric of one arm minus that of the arm it is compared with, paired by seed."""

    comparison: str
    arm: str
    against: str
    metric: str
    interval: Interval | None  # None: no pair of finished runs has the metric
    p: float  # of this one test: paired t, or McNemar's for solve rates
    adjusted_p: float  # Holm over its family: the primary effects, or the exploratory ones
    equivalence_p: float | None  # of the primary metric, with the declared margin
    lost: int  # seeds without a pair, because a run diverged, failed or has not been run
    unpaired_sd: float  # what the interval would have rested on without pairing
    primary: bool = False
    expected: float | None = None  # as the study file says
    speed_up: float | None = None  # of the main loss: tokens to equal loss, geometric mean

    @property
    def few(self) -> bool:
        return self.interval is not None and self.interval.n < FEWEST

    @property
    def stands_out(self) -> bool:
        """The interval of the difference leaves out 0; of solve rates McNemar's p counts."""
        if self.interval is None or self.few:
            return False
        rate = is_rate_over_seeds(self.metric)
        return self.p < ALPHA if rate else not self.interval.covers_zero

    @property
    def shown(self) -> bool:
        """It stands out among all that were tested with it."""
        return self.stands_out and self.adjusted_p < ALPHA

    @property
    def identical(self) -> bool:
        """Every pair has the same value to the last bit, as where one trunk is frozen."""
        i = self.interval
        rate = is_rate_over_seeds(self.metric)
        return i is not None and not self.few and not rate and i.low == i.high == 0

    @property
    def equal(self) -> bool:
        """Shown to be within the margin."""
        if self.identical:
            return True
        return self.equivalence_p is not None and self.equivalence_p < ALPHA and not self.few


def effects_of(study: Study, table: Table) -> list[Effect]:
    """Every comparison x arm x metric, primary ones first."""
    effects = [_effect(study, table, *test) for test in study.tests()]
    adjusted: dict[str, float] = {}
    for primary in (True, False):
        members = [(n, e) for n, e in enumerate(effects) if e.primary == primary]
        adjusted |= stats.holm({str(n): e.p for n, e in members if e.interval})
    return [replace(e, adjusted_p=adjusted.get(str(n), 1.0)) for n, e in enumerate(effects)]


def _effect(
    study: Study, table: Table, comparison: str, metric: str, arm: str, primary: bool
) -> Effect:
    item = study.comparisons[comparison]
    left, right = values_of(table, arm, metric), values_of(table, item.against, metric)
    seeds = [seed for seed in study.seeds if seed in left and seed in right]
    differences = [left[seed] - right[seed] for seed in seeds]
    interval = stats.t_interval(differences) if differences else None
    p = interval.p if interval else 1.0
    if is_rate_over_seeds(metric):
        p = stats.mcnemar([(left[seed], right[seed]) for seed in seeds])
    decides = metric == study.primary.metric and differences and not is_rate_over_seeds(metric)
    spread = [stats.t_interval(list(side.values())).sd for side in (left, right) if len(side) > 1]
    given = item.expected.get(metric)
    return Effect(
        *(comparison, arm, item.against, metric, interval, p),
        adjusted_p=1.0,
        equivalence_p=stats.equivalence(differences, study.primary.margin) if decides else None,
        lost=len(study.seeds) - len(seeds),
        unpaired_sd=math.hypot(*spread) if spread else math.nan,
        primary=primary,
        expected=given.effect_of(arm) if given else None,
        speed_up=_speed_up(table, arm, item.against, seeds) if metric == LOSS else None,
    )


def _speed_up(table: Table, arm: str, against: str, seeds: Sequence[int]) -> float | None:
    """Geometric mean over seeds; None unless every seed's curves reach an equal loss."""
    found = []
    for seed in seeds:
        ours, theirs = (table[side][seed].curves.get(LOSS) for side in (arm, against))
        ratio = stats.speed_up(ours.points, theirs.points) if ours and theirs else None
        if ratio is None:
            return None
        found.append(math.log(ratio))
    return math.exp(fmean(found)) if found else None


def values_of(table: Table, arm: str, metric: str) -> dict[int, float]:
    """seed -> value, of the finished runs that have the metric."""
    records = table.get(arm, {}).items()
    found = {s: r.metrics[metric] for s, r in records if r.finished and metric in r.metrics}
    return {seed: value for seed, value in found.items() if math.isfinite(value)}


def paired(table: Table, arm: str, against: str, metric: str) -> dict[int, float]:
    """seed -> value of `arm` minus that of `against`, of the seeds that both have."""
    ours, theirs = (values_of(table, side, metric) for side in (arm, against))
    return {seed: ours[seed] - theirs[seed] for seed in ours if seed in theirs}


def draw_sd(table: Table, arm: str, metric: str) -> float | None:
    """Standard deviation of a run's value over draws, root mean square over the arm's runs."""
    found = [r.draw_sd[metric] for r in table.get(arm, {}).values() if metric in r.draw_sd]
    return math.sqrt(fmean(sd * sd for sd in found)) if found else None


def references(study: Study, table: Table) -> list[tuple[RunRecord, RunRecord]]:
    """(run, the run of its seed that its losses are measured against), where there are both."""
    others = table.get(study.loss_error_against or "", {})
    runs = [record for seeds in table.values() for record in seeds.values()]
    return [(record, others[record.seed]) for record in runs if record.seed in others]


@dataclass(frozen=True)
class SolveTimes:
    """Which of two arms solves the task first, seed by seed."""

    arm: str
    against: str
    first: int  # seeds in which `arm` is first
    later: int
    n: int
    p: float  # log-rank, stratified by seed
    adjusted_p: float  # Holm over all of these


def solve_times(study: Study, table: Table) -> list[SolveTimes]:
    if study.solve_threshold is None:
        return []
    found = []
    for item in study.comparisons.values():
        for arm in item.arms:
            ours, theirs = (_solve_times(table, name) for name in (arm, item.against))
            pairs = [(ours[seed], theirs[seed]) for seed in ours if seed in theirs]
            first, later, p = stats.logrank(pairs)
            found.append(SolveTimes(arm, item.against, first, later, len(pairs), p, 1.0))
    adjusted = stats.holm({str(n): item.p for n, item in enumerate(found)})
    return [replace(item, adjusted_p=adjusted[str(n)]) for n, item in enumerate(found)]


def _solve_times(table: Table, arm: str) -> dict[int, tuple[float, bool]]:
    """seed -> (tokens, whether its task was solved after so many), of the finished runs."""
    runs = [(s, r, r.solved_at) for s, r in table.get(arm, {}).items() if r.finished]
    return {s: (float(r.tokens if at is None else at), at is not None) for s, r, at in runs}


def trunks_apart(table: Table, arm: str, against: str) -> bool:
    """The main models of two arms were trained apart: overlap alone does not rank their heads."""
    ours, theirs = table.get(arm, {}), table.get(against, {})
    pairs = [(_trunk(ours[seed]), _trunk(theirs[seed])) for seed in ours if seed in theirs]
    return not all(left == right is not None for left, right in pairs)


def _trunk(record: RunRecord) -> str | None:
    """What decides the trunk where the heads do not touch it; None: they do."""
    train, mtp = record.config["train"], record.config["mtp"]
    if train.get("freeze") == "trunk":
        return f"frozen {train.get('init_from')}"
    return f"detached {record.config['model']} {train}" if mtp.get("detach") == "all" else None


def leaks(table: Table) -> list[str]:
    """Depths whose loss lies far below the main loss see their own target, or an easier one."""
    alarms = []
    for record in (record for seeds in table.values() for record in seeds.values()):
        main = record.metrics.get(LOSS, math.nan)
        for key, loss in record.metrics.items():
            if key.startswith("val/mtp_loss/") and loss < LEAK_RATIO * main:
                where = f"{record.arm}, seed {record.seed}"
                alarms.append(f"{where}: {key} {loss:.3f} against main {main:.3f}")
    return alarms


def lost(table: Table, arms: Sequence[str]) -> list[str]:
    """The runs of `arms` that came to no result by their own fault."""
    runs = [(arm, record) for arm in arms for record in table.get(arm, {}).values()]
    return [f"{arm} seed {r.seed} {r.status}" for arm, r in runs if not r.finished]


def not_run(study: Study, table: Table) -> list[str]:
    """Per arm the seeds that were not run or measured as asked, or failed for another reason."""
    seeds = {arm: [s for s in study.seeds if s not in table.get(arm, {})] for arm in study.arms}
    named = {arm: ", ".join(map(str, missing)) for arm, missing in seeds.items() if missing}
    return [f"{arm}: no result with seed {missing}" for arm, missing in named.items()]


@dataclass(frozen=True)
class Findings:
    """All that the report says, before it is laid out."""

    loaded: LoadedStudy
    plan: Plan
    table: Table
    effects: Sequence[Effect]
    power: Sequence[Detectable]

    @property
    def records(self) -> list[RunRecord]:
        return [record for seeds in self.table.values() for record in seeds.values()]
