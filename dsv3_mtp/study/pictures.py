"""The figures of a study's report. Each arm keeps its colour and its marker."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from dsv3_mtp.config import Config
from dsv3_mtp.config.schedules import mtp_loss_weight
from dsv3_mtp.report import plots
from dsv3_mtp.report.metrics import depths_of
from dsv3_mtp.report.plots import STYLE, save_figure, short_number
from dsv3_mtp.study.archive import Table
from dsv3_mtp.study.findings import LOSS, Effect, is_primary, references, values_of
from dsv3_mtp.study.matrix import Study
from dsv3_mtp.study.measure import loss_errors
from dsv3_mtp.study.metric_names import describe_metric, is_rate_over_seeds
from dsv3_mtp.study.stats import exact_rate, solve_curve, t_interval

# Okabe and Ito's colours, then darker ones of the same hues: as many arms as a study has.
COLORS = (*plots.COLORS, plots.GREY, "#004c77", "#8f3f00", "#00694d", "#8a4f70", "#9a6b00")
MARKERS = "osD^vPX<>*hpd"
DEPTHS = {  # what depths.png shows, with its title
    "val/overlap": "overlap on real text",
    "acceptance/T1/joint": "drafts 1..k accepted, T = 1",
    "acceptance/T0/joint": "drafts 1..k accepted, greedy",
    "val/mtp_loss": "loss of depth k (not to be ranked between kinds)",
}


class Series(NamedTuple):
    """One logged metric of all runs of an arm."""

    tokens: np.ndarray
    """(n,): those that all of its seeds have logged."""
    values: np.ndarray
    """(seeds, n)"""
    seeds: list[int]


@dataclass(frozen=True)
class Data:
    """All that figures are drawn from."""

    study: Study
    configs: Mapping[str, Config]
    table: Table
    effects: Sequence[Effect]

    @cached_property
    def colors(self) -> dict[str, str]:
        return {arm: COLORS[n % len(COLORS)] for n, arm in enumerate(self.study.arms)}

    @cached_property
    def markers(self) -> dict[str, str]:
        return {arm: MARKERS[n % len(MARKERS)] for n, arm in enumerate(self.study.arms)}

    @property
    def reference(self) -> str:
        """The arm that the primary comparison measures against."""
        return self.study.comparisons[self.study.primary.comparison].against

    def curves(self, key: str) -> dict[str, Series]:
        """Arm -> its runs' logged `key`, of every arm that has any."""
        found = {}
        for arm in self.colors:
            runs = {
                r.seed: dict(r.curves[key].points)
                for r in self.table[arm].values()
                if key in r.curves
            }
            common = sorted(set.intersection(*map(set, runs.values()))) if runs else []
            if common:
                values = np.array([[run[t] for t in common] for run in runs.values()])
                found[arm] = Series(np.array(common), values, list(runs))
        return found

    def over_reference(self) -> dict[str, Series]:
        """Main loss minus that of the reference arm, paired by seed, at the tokens that both have."""
        curves = self.curves(LOSS)
        base, found = curves.pop(self.reference, None), {}
        for arm, ours in curves.items() if base else ():
            assert base is not None
            seeds = [seed for seed in ours.seeds if seed in base.seeds]
            common, left, right = np.intersect1d(ours.tokens, base.tokens, return_indices=True)
            if seeds and len(common):
                a = ours.values[[ours.seeds.index(s) for s in seeds]][:, left]
                b = base.values[[base.seeds.index(s) for s in seeds]][:, right]
                found[arm] = Series(common, a - b, seeds)
        return found


def draw_all(data: Data, folder: Path) -> list[tuple[str, str]]:
    """Writes the PNG files that the data allow, the answer's first, and removes others of these
    names.

    Returns [(file, caption)].
    """
    drawn = []
    for name, (draw, caption) in figures(data.study).items():
        with matplotlib.rc_context(STYLE):
            figure = draw(data)
            if figure is None:
                (folder / name).unlink(missing_ok=True)
            else:
                save_figure(figure, folder / name)
                drawn.append((name, caption))
    return drawn


def figures(study: Study) -> dict[str, tuple[Callable[[Data], Figure | None], str]]:
    """File -> (how it is drawn, caption)."""
    against = study.comparisons[study.primary.comparison].against
    rate = is_rate_over_seeds(study.primary.metric)
    answer = (
        "Share of seeds that solved the task, with Clopper and Pearson's exact interval."
        if rate
        else "The primary comparison: paired differences, one small dot per seed, and their 95 % t "
        "intervals; an interval that covers 0 is no detectable difference. Grey: the margin within "
        "which a difference would not matter. Open diamond: what was expected."
    )
    return {
        "answer.png": (draw_answer, answer),
        "loss.png": (
            draw_losses,
            f"Left: main validation loss of {against} over training, beside n-gram floors where they "
            f"were measured. Right: each arm's main loss minus that of {against}, mean over paired "
            "seeds, with the 95 % t interval at the end; below 0 is better.",
        ),
        "effects.png": (
            draw_effects,
            "Exploratory comparisons: paired differences with 95 % t intervals over seeds.",
        ),
        "depths.png": (
            draw_depths,
            "Per depth, mean over seeds with 95 % t intervals. Losses of heads that see other tokens "
            "must not be ranked against each other.",
        ),
        "tradeoff.png": (
            draw_tradeoff,
            "Quality against drafting: main loss and tokens per step, free-running; small marks are "
            "seeds, large ones means. Better is to the lower right. Lines: arms that do not draft.",
        ),
        "lambda.png": (
            draw_lambda,
            "The loss weight lambda over training, of the arms that differ in it.",
        ),
        "balance.png": (
            draw_balance,
            "MaxVio, the load of the busiest expert above the mean, over training; lower is better.",
        ),
        "loss_error.png": (
            draw_loss_errors,
            f"Training losses relative to those of {study.loss_error_against}, smoothed with EMA 0.9 "
            "(V3 B.1): mean over seeds, band from the lowest to the highest seed; the grey band is "
            "+-0.25 %, V3's bound.",
        ),
        "solved.png": (
            draw_solved,
            "Share of seeds that have not solved the task yet (Kaplan and Meier); runs that end "
            "unsolved are censored. Lower, sooner is better.",
        ),
    }


def draw_answer(data: Data) -> Figure:
    """The primary comparison alone, readable at the width of a phone."""
    study, metric = data.study, data.study.primary.metric
    effects = [e for e in data.effects if is_primary(study, e)]
    arms = [data.reference, *study.comparisons[study.primary.comparison].arms]
    rows = len(arms) if is_rate_over_seeds(metric) else len(effects)
    figure = Figure(figsize=(7, 1.5 + 0.5 * rows), layout="constrained")
    ax = figure.subplots()
    words, better = describe_metric(metric)
    if is_rate_over_seeds(metric):
        for y, arm in enumerate(reversed(arms)):
            values = list(values_of(data.table, arm, metric).values())
            if values:
                low, high = exact_rate(int(sum(values)), len(values))
                ax.plot([low, high], [y, y], color=data.colors[arm], lw=2.5)
                ax.plot([np.mean(values)], [y], data.markers[arm], color=data.colors[arm], ms=8)
        ax.set_yticks(range(rows), list(reversed(arms)))
        ax.set_xlim(-0.02, 1.02)
        ax.set_xlabel(words)
    else:
        for y, effect in enumerate(reversed(effects)):
            _interval(ax, y, effect, data.colors[effect.arm], data.markers[effect.arm])
            seeds = (
                values_of(data.table, effect.arm, metric),
                values_of(data.table, effect.against, metric),
            )
            each = [seeds[0][s] - seeds[1][s] for s in seeds[0] if s in seeds[1]]
            ax.plot(
                each, [y - 0.25] * len(each), ".", color=data.colors[effect.arm], ms=5, alpha=0.7
            )
            if effect.expected is not None:
                ax.plot([effect.expected], [y], "D", mfc="none", mec="#1a1a1a", ms=9)
        ax.axvspan(-study.primary.margin, study.primary.margin, color="#8c8c8c", alpha=0.18, lw=0)
        ax.axvline(0, color="#8c8c8c", lw=1)
        ax.set_yticks(range(rows), [e.arm for e in reversed(effects)])
        ax.set_xlabel(f"{words}: arm minus {data.reference}", fontsize=9)
    ax.set_ylim(-0.6, rows - 0.4)
    _mark_better(ax, better)
    return figure


def _interval(ax: Axes, y: float, effect: Effect, color: str, marker: str) -> None:
    i = effect.interval
    if i is None:
        return
    if i.n > 1 and not is_rate_over_seeds(effect.metric):
        # a solve rate's t interval may leave out 0 where McNemar's test finds nothing
        ax.plot([i.low, i.high], [y, y], color=color, lw=2.5)
    ax.plot([i.mean], [y], marker, color=color, ms=8)


def _mark_better(ax: Axes, better: str | None) -> None:
    if better:
        text = "better \N{RIGHTWARDS ARROW}" if better == "higher" else "\N{LEFTWARDS ARROW} better"
        ax.set_title(
            text, loc="right" if better == "higher" else "left", fontsize=9, color="#555555"
        )


def draw_losses(data: Data) -> Figure | None:
    curves, differences = data.curves(LOSS), data.over_reference()
    if data.reference not in curves:
        return None
    figure = Figure(figsize=(12, 5), layout="constrained")
    axes = figure.subplots(1, 1 + bool(differences), squeeze=False)[0]
    base = curves[data.reference]
    _mean_and_band(data, axes[0], data.reference, base, 0.2)
    axes[0].set_title(f"main validation loss of {data.reference} (nats per token)")
    for name, style in (("unigram", ":"), ("bigram", "--"), ("trigram", "-.")):
        floor = list(values_of(data.table, data.reference, f"val/floor/{name}").values())
        if floor:
            axes[0].axhline(np.mean(floor), color="#8c8c8c", ls=style, lw=1.2)
            axes[0].annotate(
                f"{name} table", (base.tokens[0], np.mean(floor)), fontsize=8, va="bottom"
            )
    _tokens(axes[0])
    if differences:
        ax = axes[1]
        ax.axhline(0, color=data.colors[data.reference], lw=1)
        for n, (arm, (tokens, values, _)) in enumerate(differences.items()):
            color, marker = data.colors[arm], data.markers[arm]
            late = (
                tokens >= tokens[-1] / 5
            )  # the first steps, where losses fall fast, would set the scale
            ax.plot(tokens[late], values.mean(0)[late], marker=marker, ms=4, color=color, label=arm)
            if len(values) > 1:
                i = t_interval(values[:, -1].tolist())
                x = tokens[-1] * (1.02 + 0.012 * n)
                ax.plot([x, x], [i.low, i.high], color=color, lw=2)
        ax.set_title(f"main loss minus that of {data.reference}")
        ax.annotate(
            "\N{DOWNWARDS ARROW} better",
            (0.01, 0.01),
            xycoords="axes fraction",
            fontsize=9,
            color="#555555",
        )
        _tokens(ax)
    return _with_legend(data, figure)


def draw_effects(data: Data) -> Figure | None:
    """One panel per metric; metrics without an interval are left out."""
    groups: dict[str, list[Effect]] = {}
    for effect in data.effects:
        if (
            effect.interval is not None
            and effect.interval.n > 1
            and not is_primary(data.study, effect)
        ):
            groups.setdefault(effect.metric, []).append(effect)
    if not groups:
        return None
    rows = sum(len(group) for group in groups.values())
    figure = Figure(figsize=(11, 1.0 * len(groups) + 0.34 * rows + 0.4), layout="constrained")
    heights = [2 + len(group) for group in groups.values()]
    axes = figure.subplots(len(groups), 1, height_ratios=heights, squeeze=False)[:, 0]
    for ax, (metric, group) in zip(axes, groups.items(), strict=True):
        for y, effect in enumerate(reversed(group)):
            _interval(
                ax,
                y,
                effect,
                data.colors.get(effect.arm, "#1a1a1a"),
                data.markers.get(effect.arm, "o"),
            )
        ax.axvline(0, color="#8c8c8c", lw=1)
        if metric == data.study.primary.metric:
            margin = data.study.primary.margin
            ax.axvspan(-margin, margin, color="#8c8c8c", alpha=0.15, lw=0)
        labels = [f"{e.arm} - {e.against}  ({e.comparison})" for e in reversed(group)]
        ax.set_yticks(range(len(group)), labels)
        ax.set_ylim(-0.7, len(group) - 0.3)
        words, better = describe_metric(metric)
        ax.set_title(words + (f" ({better} is better)" if better else ""))
    return figure


def draw_depths(data: Data) -> Figure | None:
    """One panel per metric that was measured; a depth axis has whole depths."""
    panels: list[tuple[str, dict[str, list[int]]]] = []
    for family in DEPTHS:
        depths = {}
        for arm, records in data.table.items():
            found = [set(depths_of(r.metrics, family)) for r in records.values() if r.metrics]
            if found and (shared := sorted(set.intersection(*found))):
                depths[arm] = shared
        if depths:
            panels.append((family, depths))
    if not panels:
        return None
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(2 + 5 * columns, 4.2 * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for ax in axes[len(panels) :]:
        ax.remove()
    for ax, (family, depths) in zip(axes, panels, strict=False):
        deepest = max(map(max, depths.values()))
        for n, (arm, ks) in enumerate(depths.items()):
            values = [list(values_of(data.table, arm, f"{family}/{k}").values()) for k in ks]
            if all(values):
                shift = 0.24 * ((n + 0.5) / len(depths) - 0.5)  # a quarter of a depth in all
                half = [t_interval(v).high - np.mean(v) if len(v) > 1 else 0.0 for v in values]
                style: Any = {"color": data.colors[arm], "marker": data.markers[arm], "ms": 5}
                line = {"ls": "-" if len(ks) > 1 else "none"}
                ax.errorbar(
                    np.array(ks) + shift,
                    [np.mean(v) for v in values],
                    half,
                    label=arm,
                    **style,
                    **line,
                )
        ax.set_title(DEPTHS[family])
        ax.set_xlabel("depth k")
        ax.set_xticks(range(1, deepest + 1))
        ax.set_xlim(0.5, deepest + 0.5)
        if family != "val/mtp_loss":
            ax.set_ylim(0, 1)
    return _with_legend(data, figure)


def draw_tradeoff(data: Data) -> Figure | None:
    """Only temperatures that were measured, with the same axes; arms that do not draft are lines."""
    kinds = {0: "greedy", 1: "temperature 1"}
    points: dict[int, dict[str, np.ndarray]] = {}
    losses = {arm: values_of(data.table, arm, LOSS) for arm in data.colors}
    for temperature in kinds:
        for arm, loss in losses.items():
            drafts = values_of(data.table, arm, f"acceptance/T{temperature}/tokens_per_step")
            both = np.array([(drafts[seed], loss[seed]) for seed in drafts if seed in loss])
            if len(both):
                points.setdefault(temperature, {})[arm] = both
    if not points:
        return None
    figure = Figure(figsize=(2 + 5 * len(points), 5), layout="constrained")
    axes = figure.subplots(1, len(points), squeeze=False, sharex=True, sharey=True)[0]
    drafting = set().union(*points.values())
    for ax, (temperature, arms) in zip(axes, points.items(), strict=True):
        for arm, both in arms.items():
            style: Any = {"color": data.colors[arm], "marker": data.markers[arm], "ls": ""}
            ax.plot(*both.T, alpha=0.45, ms=4, **style)
            ax.plot(*both.mean(0), ms=10, mec="white", label=arm, **style)
        for arm, loss in losses.items():
            if loss and arm not in drafting:
                ax.axhline(np.mean(list(loss.values())), color=data.colors[arm], lw=1.4, label=arm)
        ax.set_title(kinds[temperature])
        ax.set_xlabel("tokens per step, free-running")
        ax.annotate(
            "better \N{SOUTH EAST ARROW}",
            (0.98, 0.02),
            xycoords="axes fraction",
            ha="right",
            fontsize=9,
        )
    axes[0].set_ylabel("main validation loss")
    return _with_legend(data, figure)


def draw_lambda(data: Data) -> Figure | None:
    """Only where arms differ in it; equal schedules are drawn once and named together."""
    progress = np.linspace(0.0, 1.0, 1001).tolist()
    shapes: dict[tuple[float, ...], list[str]] = {}
    for arm in data.colors:
        mtp = data.configs[arm].mtp
        if mtp.depths:
            curve = tuple(mtp_loss_weight(mtp.loss_weight, p) for p in progress)
            shapes.setdefault(curve, []).append(arm)
    if len(shapes) < 2:
        return None
    figure = Figure(figsize=(9, 4.6), layout="constrained")
    ax = figure.subplots()
    for n, (curve, arms) in enumerate(shapes.items()):
        style: Any = {"color": data.colors[arms[0]], "marker": data.markers[arms[0]], "ms": 5}
        ax.plot(progress, curve, markevery=(30 * n % 100, 100), label=", ".join(arms), **style)
    ax.set_title("lambda")
    ax.set_xlabel("fraction of the training tokens")
    ax.set_ylim(bottom=0)
    figure.legend(*ax.get_legend_handles_labels(), loc="outside right upper")
    return figure


def draw_balance(data: Data) -> Figure | None:
    keys = {"moe/max_violation": "trunk's routers", "moe/mtp_max_violation/1": "first MTP router"}
    panels = {title: found for key, title in keys.items() if (found := data.curves(key))}
    if not panels:
        return None
    figure = Figure(figsize=(2 + 5 * len(panels), 4.6), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for ax, (title, found) in zip(axes, panels.items(), strict=True):
        for arm, (tokens, values, _) in found.items():
            width = max(1, len(tokens) // 12)
            smooth = np.convolve(values.mean(0), np.ones(width) / width, "valid")
            style: Any = {"color": data.colors[arm], "marker": data.markers[arm], "ms": 5}
            ax.plot(tokens[width - 1 :], smooth, markevery=0.15, label=arm, **style)
        ax.set_title(f"MaxVio, {title}")
        ax.set_ylim(bottom=0)
        _tokens(ax)
    return _with_legend(data, figure)


def draw_loss_errors(data: Data) -> Figure | None:
    keys = {"train/main_loss": "main loss", "train/mtp_loss/1": "loss of the first MTP depth"}
    errors: dict[str, dict[str, list[dict[int, float]]]] = {}
    for record, reference in references(data.study, data.table):
        if record is not reference:
            for key, error in loss_errors(record.curves, reference.curves).items():
                if key in keys and error:
                    errors.setdefault(key, {}).setdefault(record.arm, []).append(error)
    if not errors:
        return None
    figure = Figure(figsize=(2 + 5 * len(errors), 5), layout="constrained")
    axes = figure.subplots(1, len(errors), squeeze=False, sharey=True)[0]
    for ax, key in zip(axes, sorted(errors), strict=True):
        ax.axhspan(-0.25, 0.25, color="#8c8c8c", alpha=0.2, lw=0)
        for arm, runs in errors[key].items():
            common = sorted(set.intersection(*map(set, runs)))
            values = np.array([[run[t] for t in common] for run in runs])
            _mean_and_band(data, ax, arm, Series(np.array(common), values, []), 0.1)
        ax.set_title(f"relative error of the {keys[key]}, %")
        _tokens(ax)
    return _with_legend(data, figure)


def draw_solved(data: Data) -> Figure | None:
    if data.study.solve_threshold is None:
        return None
    figure = Figure(figsize=(8, 4.6), layout="constrained")
    ax = figure.subplots()
    for n, arm in enumerate(data.colors):
        runs = [record for record in data.table[arm].values() if record.finished]
        if runs:
            curve = solve_curve([r.solved_at for r in runs], [r.tokens for r in runs])
            end = max(record.tokens for record in runs)
            left = (
                np.array([1, *curve.unsolved, (1, *curve.unsolved)[-1]]) + 0.004 * n
            )  # side by side
            style: Any = {"color": data.colors[arm], "marker": data.markers[arm], "ms": 5}
            label = f"{arm} (n = {len(runs)})"
            ax.step([0, *curve.times, end], left, where="post", label=label, **style)
    ax.set_title("share of seeds still unsolved")
    ax.set_ylim(-0.03, 1.06)
    _tokens(ax)
    figure.legend(*ax.get_legend_handles_labels(), loc="outside right upper")
    return figure if ax.lines else None


def _mean_and_band(data: Data, ax: Axes, arm: str, series: Series, alpha: float) -> None:
    color, (tokens, values, _) = data.colors[arm], series
    marker: Any = {"marker": data.markers[arm], "ms": 4, "markevery": 0.1}
    ax.plot(tokens, values.mean(0), color=color, label=arm, **marker)
    ax.fill_between(tokens, values.min(0), values.max(0), color=color, alpha=alpha, lw=0)


def _with_legend(data: Data, figure: Figure) -> Figure:
    """A legend of the arms that are drawn, in their order."""
    shown = {label for ax in figure.axes for label in ax.get_legend_handles_labels()[1]}
    handles = [
        Line2D([], [], color=data.colors[arm], marker=data.markers[arm], ms=5, label=arm)
        for arm in data.colors
        if arm in shown
    ]
    figure.legend(handles=handles, loc="outside right upper")
    return figure


def _tokens(ax: Axes) -> None:
    ax.xaxis.set_major_locator(MaxNLocator(6))
    ax.xaxis.set_major_formatter(lambda value, _: short_number(value))
    ax.set_xlabel("tokens")
