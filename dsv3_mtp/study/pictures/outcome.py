"""Pictures of what came out: the answer, effects, depths, drafts against loss, time to solve."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from dsv3_mtp.report.metrics import depths_of
from dsv3_mtp.study.findings import LOSS, Effect, paired, values_of
from dsv3_mtp.study.matrix import Study
from dsv3_mtp.study.metric_names import describe_metric, is_rate_over_seeds
from dsv3_mtp.study.pictures.base import (
    PictureData,
    draw_interval,
    mark_better,
    token_axis,
    with_legend,
)
from dsv3_mtp.study.stats import exact_rate, solve_curve, t_interval

DEPTHS = {  # what depths.png shows, with its title
    "val/overlap": "overlap on real text",
    "acceptance/T1/joint": "drafts 1..k accepted, T = 1",
    "acceptance/T0/joint": "drafts 1..k accepted, greedy",
    "val/mtp_loss": "loss of depth k (not to be ranked between kinds)",
}


def draw_answer(data: PictureData) -> Figure | None:
    """The primary comparison alone, readable at the width of a phone."""
    study, metric = data.study, data.study.primary.metric
    effects = [e for e in data.effects if e.primary]
    arms = [data.reference, *study.comparisons[study.primary.comparison].arms]
    rate = is_rate_over_seeds(metric)
    rated = any(values_of(data.table, arm, metric) for arm in arms)
    if not (rated if rate else any(e.interval for e in effects)):
        return None
    rows = len(arms) if rate else len(effects)
    figure = Figure(figsize=(7, max(2.6, 1.5 + 0.5 * rows)), layout="constrained")
    ax = figure.subplots()
    words, better = describe_metric(metric)
    if rate:
        _rates(ax, data, arms)
        ax.set_xlabel(words)
    else:
        _paired(ax, data, effects)
        ax.set_xlabel(f"{words}: arm minus {data.reference}", fontsize=9)
        figure.legend(handles=_key(study, effects), loc="outside lower center", ncols=4, fontsize=8)
    ax.set_ylim(-0.6, rows - 0.4)
    mark_better(ax, better)
    return figure


def _rates(ax: Axes, data: PictureData, arms: Sequence[str]) -> None:
    for y, arm in enumerate(reversed(arms)):
        values = list(values_of(data.table, arm, data.study.primary.metric).values())
        if values:
            low, high = exact_rate(int(sum(values)), len(values))
            ax.plot([low, high], [y, y], color=data.colors[arm], lw=2.5)
            ax.plot([np.mean(values)], [y], data.markers[arm], color=data.colors[arm], ms=8)
    ax.set_yticks(range(len(arms)), list(reversed(arms)))
    ax.set_xlim(-0.02, 1.02)


def _paired(ax: Axes, data: PictureData, effects: Sequence[Effect]) -> None:
    metric, margin = data.study.primary.metric, data.study.primary.margin
    for y, effect in enumerate(reversed(effects)):
        color = data.colors[effect.arm]
        draw_interval(ax, y, effect, color, data.markers[effect.arm])
        each = list(paired(data.table, effect.arm, effect.against, metric).values())
        ax.plot(each, [y - 0.25] * len(each), ".", color=color, ms=5, alpha=0.7)
        if effect.expected is not None:
            ax.plot([effect.expected], [y], "D", mfc="none", mec="#1a1a1a", ms=9)
    ax.axvspan(-margin, margin, color="#8c8c8c", alpha=0.18, lw=0)
    ax.axvline(0, color="#8c8c8c", lw=1)
    names = [e.arm if e.interval else f"{e.arm} (no result)" for e in reversed(effects)]
    ax.set_yticks(range(len(effects)), names)


def _key(study: Study, effects: Sequence[Effect]) -> list[Artist]:
    """What the marks of the answer are."""
    mark: Any = {"color": "#1a1a1a", "marker": "o"}
    handles: list[Artist] = [Line2D([], [], lw=2.5, ms=6, label="mean, 95 %", **mark)]
    handles.append(Line2D([], [], ls="", ms=3, label="one seed", **mark))
    handles.append(Patch(color="#8c8c8c", alpha=0.18, label=f"margin {study.primary.margin:g}"))
    if any(e.expected is not None for e in effects):
        hollow: Any = {"mfc": "none", "mec": "#1a1a1a"}
        handles.append(Line2D([], [], ls="", marker="D", label="expected", **hollow))
    return handles


def draw_effects(data: PictureData) -> Figure | None:
    """One panel per metric; metrics without an interval are left out."""
    groups: dict[str, list[Effect]] = {}
    for effect in data.effects:
        if effect.interval is not None and effect.interval.n > 1 and not effect.primary:
            groups.setdefault(effect.metric, []).append(effect)
    if not groups:
        return None
    rows = sum(len(group) for group in groups.values())
    figure = Figure(figsize=(11, 1.0 * len(groups) + 0.34 * rows + 0.4), layout="constrained")
    heights = [2 + len(group) for group in groups.values()]
    axes = figure.subplots(len(groups), 1, height_ratios=heights, squeeze=False)[:, 0]
    for ax, (metric, group) in zip(axes, groups.items(), strict=True):
        for y, effect in enumerate(reversed(group)):
            color = data.colors.get(effect.arm, "#1a1a1a")
            draw_interval(ax, y, effect, color, data.markers.get(effect.arm, "o"))
        ax.axvline(0, color="#8c8c8c", lw=1)
        if metric == data.study.primary.metric:
            margin = data.study.primary.margin
            ax.axvspan(-margin, margin, color="#8c8c8c", alpha=0.15, lw=0)
        labels = [f"{e.arm} - {e.against}  ({e.comparison})" for e in reversed(group)]
        ax.set_yticks(range(len(group)), labels)
        ax.set_ylim(-0.7, len(group) - 0.3)
        words, better = describe_metric(metric)
        ax.set_title(words + (f" ({better} is better)" if better else ""), wrap=True)
    return figure


def draw_depths(data: PictureData) -> Figure | None:
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
                means = [np.mean(v) for v in values]
                half = [t_interval(v).high - np.mean(v) if len(v) > 1 else 0.0 for v in values]
                style = data.style(arm, ls="-" if len(ks) > 1 else "none")
                ax.errorbar(np.array(ks) + shift, means, half, label=arm, **style)
        ax.set_title(DEPTHS[family])
        ax.set_xlabel("depth k")
        ax.set_xticks(range(1, deepest + 1))
        ax.set_xlim(0.5, deepest + 0.5)
        if family != "val/mtp_loss":
            ax.set_ylim(0, 1)
    return with_legend(data, figure)


def draw_tradeoff(data: PictureData) -> Figure | None:
    """The temperatures that were measured, on the same axes; arms that do not draft are lines."""
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
            ax.plot(*both.T, alpha=0.45, **data.style(arm, ms=4, ls=""))
            ax.plot(*both.mean(0), mec="white", label=arm, **data.style(arm, ms=10, ls=""))
        for arm, loss in losses.items():
            if loss and arm not in drafting:
                ax.axhline(np.mean(list(loss.values())), color=data.colors[arm], lw=1.4, label=arm)
        ax.set_title(kinds[temperature])
        ax.set_xlabel("tokens per step, free-running")
        place: Any = {"xycoords": "axes fraction", "ha": "right", "fontsize": 9}
        ax.annotate("better \N{SOUTH EAST ARROW}", (0.98, 0.02), **place)
    axes[0].set_ylabel("main validation loss")
    return with_legend(data, figure)


def draw_solved(data: PictureData) -> Figure | None:
    if data.study.solve_threshold is None:
        return None
    figure = Figure(figsize=(8, 4.6), layout="constrained")
    ax = figure.subplots()
    for n, arm in enumerate(data.colors):
        runs = [record for record in data.table[arm].values() if record.finished]
        if runs:
            curve = solve_curve([r.solved_at for r in runs], [r.tokens for r in runs])
            end = max(record.tokens for record in runs)
            # side by side
            left = np.array([1, *curve.unsolved, (1, *curve.unsolved)[-1]]) + 0.004 * n
            label = f"{arm} (n = {len(runs)})"
            ax.step([0, *curve.times, end], left, where="post", label=label, **data.style(arm))
    ax.set_title("share of seeds still unsolved")
    ax.set_ylim(-0.03, 1.06)
    token_axis(ax)
    figure.legend(*ax.get_legend_handles_labels(), loc="outside right upper")
    return figure if ax.lines else None
