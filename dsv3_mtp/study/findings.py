"""From the results of all runs to effects and plain words. No drawing, no layout, no torch."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dsv3_mtp.report.metrics import LEAK_RATIO
from dsv3_mtp.study import stats
from dsv3_mtp.study.matrix import Study
from dsv3_mtp.study.metric_names import describe_metric
from dsv3_mtp.study.stats import Interval

ALPHA = 0.05
Results = Mapping[str, Any]  # results.json of one run
Table = Mapping[str, Mapping[int, Results]]  # arm -> seed -> results


@dataclass(frozen=True)
class Effect:
    """One metric of one arm minus that of the arm it is compared with, paired by seed."""

    comparison: str
    arm: str
    against: str
    metric: str
    interval: Interval | None  # None: no pair of finished runs has the metric
    p: float  # of this one test: paired t, or Fisher's for solve rates
    adjusted_p: float  # Holm over its family: the primary effects, or the exploratory ones
    equivalence_p: float | None  # of the primary metric, with the declared margin
    lost: int  # seeds without a pair, because a run diverged, failed or has not been run
    unpaired_sd: float  # what the interval would have rested on without pairing


def effects_of(study: Study, table: Table) -> list[Effect]:
    """Every comparison x arm x metric, primary ones first."""
    metrics = dict.fromkeys([study.primary.metric, *study.metrics])
    effects = [
        _effect(study, table, comparison, arm, item.against, metric)
        for comparison, item in study.comparisons.items()
        for metric in metrics
        for arm in item.arms
    ]
    effects.sort(key=lambda effect: not is_primary(study, effect))
    adjusted: dict[str, float] = {}
    for primary in (True, False):
        family = {
            str(n): e.p
            for n, e in enumerate(effects)
            if is_primary(study, e) == primary and e.interval
        }
        adjusted |= stats.holm(family)
    return [replace(e, adjusted_p=adjusted.get(str(n), 1.0)) for n, e in enumerate(effects)]


def is_primary(study: Study, effect: Effect) -> bool:
    return (effect.comparison, effect.metric) == (study.primary.comparison, study.primary.metric)


def _effect(
    study: Study, table: Table, comparison: str, arm: str, against: str, metric: str
) -> Effect:
    left, right = values_of(table, arm, metric), values_of(table, against, metric)
    seeds = [seed for seed in study.seeds if seed in left and seed in right]
    differences = [left[seed] - right[seed] for seed in seeds]
    interval = stats.t_interval(differences) if differences else None
    p = interval.p if interval else 1.0
    if metric == "task/solved":
        p = (
            stats.fisher(*((int(sum(side.values())), len(side)) for side in (left, right)))
            if left and right
            else 1.0
        )
    decides = metric == study.primary.metric and differences
    tost = stats.equivalence(differences, study.primary.margin) if decides else None
    spread = [stats.t_interval(list(side.values())).sd for side in (left, right) if len(side) > 1]
    unpaired = math.hypot(*spread) if spread else math.nan
    return Effect(
        comparison,
        arm,
        against,
        metric,
        interval,
        p,
        1.0,
        tost,
        len(study.seeds) - len(seeds),
        unpaired,
    )


def values_of(table: Table, arm: str, metric: str) -> dict[int, float]:
    """seed -> value, of the finished runs that have the metric and a finite value of it."""
    found = {}
    for seed, results in table.get(arm, {}).items():
        value = results.get("metrics", {}).get(metric) if results["status"] == "finished" else None
        if value is not None and math.isfinite(value):
            found[seed] = value
    return found


def references(study: Study, curves: Mapping[str, Mapping[int, Any]]) -> list[tuple[str, int, Any]]:
    """(arm, seed, curves of the arm that its losses are measured against) of every run that has
    them.
    """
    others = curves.get(study.loss_error_against or "", {})
    return [
        (arm, seed, others[seed])
        for arm, seeds in curves.items()
        for seed in seeds
        if seed in others
    ]


def stands_out(effect: Effect) -> bool:
    """The interval of the difference leaves out 0; of solve rates it is Fisher's p that counts."""
    if effect.interval is None or effect.interval.n < 2:
        return False
    return effect.p < ALPHA if effect.metric == "task/solved" else not effect.interval.covers_zero


def verdict(effect: Effect, *, margin: float | None, lost_runs: Sequence[str]) -> str:
    """One effect in plain words; never more than the interval says. lost_runs: those that
    diverged.
    """
    words, better = describe_metric(effect.metric)
    subject = f"{effect.arm} against {effect.against}, {words}:"
    if effect.interval is None:
        return f"{subject} not measured."
    i = effect.interval
    if i.n < 2:
        return f"{subject} {i.mean:+.4g} with one seed: no conclusion."
    tail = (
        f" Left out, which counts against their arm: {', '.join(lost_runs)}." if lost_runs else ""
    )
    if effect.metric == "task/solved":
        found = "a difference" if effect.adjusted_p < ALPHA else "a hint only"
        found = found if stands_out(effect) else "no detectable difference"
        return (
            f"{subject} {found}, {i.mean:+.2f} (Fisher p = "
            f"{effect.p:.3g}, Holm p = {effect.adjusted_p:.3g}).{tail}"
        )
    size = f"{i.mean:+.4g} [{i.low:+.4g}, {i.high:+.4g}], n = {i.n}"
    same = ""
    if margin is not None and effect.equivalence_p is not None:
        within = effect.equivalence_p < ALPHA
        same = (
            f"{'' if within else 'not '}shown to be within "
            f"+-{margin:g} (TOST p = {effect.equivalence_p:.2g})"
        )
    if not stands_out(effect):
        return f"{subject} no detectable difference, {size}{f'; {same}' if same else ''}.{tail}"
    direction = "higher" if i.mean > 0 else "lower"
    good = f", which is {'better' if direction == better else 'worse'}" if better else ""
    if effect.adjusted_p >= ALPHA:
        return (
            f"{subject} a hint only: {direction}, {size}, Holm p = {effect.adjusted_p:.2g}.{tail}"
        )
    small = (
        f", but {same}"
        if same and effect.equivalence_p is not None and effect.equivalence_p < ALPHA
        else ""
    )
    return f"{subject} {direction}, {size}, Holm p = {effect.adjusted_p:.2g}{good}{small}.{tail}"


def leaks(table: Table) -> list[str]:
    """Depths whose loss lies far below the main loss see their own target, or an easier one."""
    alarms = []
    for arm, seeds in table.items():
        for seed, results in seeds.items():
            metrics = results.get("metrics", {})
            main = metrics.get("val/main_loss", math.nan)
            low = [
                key
                for key in metrics
                if key.startswith("val/mtp_loss/") and metrics[key] < LEAK_RATIO * main
            ]
            alarms += [
                f"{arm}, seed {seed}: {key} {metrics[key]:.3f} against main {main:.3f}"
                for key in low
            ]
    return alarms


def lost(table: Table, arms: Sequence[str]) -> list[str]:
    """The runs of `arms` that came to no result by their own fault."""
    runs = [
        (arm, seed, results["status"])
        for arm in arms
        for seed, results in table.get(arm, {}).items()
    ]
    return [f"{arm} seed {seed} {status}" for arm, seed, status in runs if status != "finished"]


def not_run(study: Study, table: Table) -> list[str]:
    """Per arm the seeds that have not been run or measured as asked, or failed for a reason that is
    not training's.
    """
    found = []
    for arm in study.arms:
        seeds = [str(seed) for seed in study.seeds if seed not in table.get(arm, {})]
        if seeds:
            found.append(f"{arm}: no result with seed {', '.join(seeds)}")
    return found
