"""The figures of a study's report. Each arm keeps its colour; lines are means over seeds, bands
their range.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from dsv3_mtp.config import Config
from dsv3_mtp.config.schedules import depth_loss_weights, mtp_loss_weight
from dsv3_mtp.report import plots
from dsv3_mtp.report.metrics import Record, depths_of
from dsv3_mtp.report.plots import STYLE, save_figure, short_number
from dsv3_mtp.study.findings import Effect, Table, is_primary, references, values_of
from dsv3_mtp.study.matrix import Study
from dsv3_mtp.study.measure import loss_errors
from dsv3_mtp.study.metric_names import describe_metric
from dsv3_mtp.study.stats import solve_curve, t_interval

# Okabe and Ito's colours, then darker ones of the same hues: as many arms as a study has.
COLORS = (*plots.COLORS, plots.GREY, "#004c77", "#8f3f00", "#00694d", "#8a4f70", "#9a6b00")
Curves = Mapping[str, Mapping[int, Sequence[Record]]]  # arm -> seed -> metrics.jsonl


@dataclass(frozen=True)
class Data:
    """All that figures are drawn from."""

    study: Study
    configs: Mapping[str, Config]
    table: Table
    curves: Curves
    effects: Sequence[Effect]

    @cached_property
    def colors(self) -> dict[str, str]:
        return {arm: COLORS[number % len(COLORS)] for number, arm in enumerate(self.study.arms)}


def draw_all(data: Data) -> list[tuple[str, str]]:
    """Writes the PNG files that the data allow into the study's folder, and removes old ones that
    they do not allow.

    Returns [(file, caption)].
    """
    study = data.study
    figures = {
        "loss.png": (
            draw_losses,
            "Main loss of every arm on the same validation "
            "windows: mean over seeds, band from the lowest to the "
            "highest seed. Left the whole run, right the last half.",
        ),
        "effects.png": (
            draw_effects,
            "Paired differences with 95 % t intervals over seeds, "
            "the primary comparison in black. An interval that "
            "covers 0 is no detectable difference. Solve rates "
            "have no interval here: Fisher's test, in the table, "
            "decides.",
        ),
        "depths.png": (
            draw_depths,
            "Per depth: teacher-forced loss"
            + ", and acceptance of free-running drafts 1..k" * (study.acceptance is not None)
            + ". Losses of heads that see other tokens must not be ranked against each other.",
        ),
        "tradeoff.png": (
            draw_tradeoff,
            "Quality against drafting: main loss and tokens per "
            "step, free-running; small marks are seeds, large ones "
            "means.",
        ),
        "lambda.png": (
            draw_lambda,
            (
                "Weight of the extra losses over training (logarithmic "
                "above 0.1): lambda, and each depth's share of it."
            ),
        ),
        "balance.png": (
            draw_balance,
            "MaxVio, the relative overload of the busiest expert: "
            "mean of the trunk's routers, and of the first MTP "
            "router; smoothed.",
        ),
        "loss_error.png": (
            draw_loss_errors,
            "Training losses relative to those of "
            f"{study.loss_error_against}, smoothed with EMA 0.9 (V3 B.1): mean "
            "over seeds, band from the lowest to the highest "
            "seed; the grey band is +-0.25 %, V3's bound.",
        ),
        "solved.png": (
            draw_solved,
            (
                "Share of seeds that have not solved the task yet "
                "(Kaplan and Meier); runs that end unsolved are censored."
            ),
        ),
    }
    drawn = []
    for name, (draw, caption) in figures.items():
        with matplotlib.rc_context(STYLE):
            figure = draw(data)
            if figure is None:
                (study.folder / name).unlink(missing_ok=True)
            else:
                save_figure(figure, study.folder / name)
                drawn.append((name, caption))
    return drawn


def draw_losses(data: Data) -> Figure | None:
    figure = Figure(figsize=(12, 5), layout="constrained")
    whole, late = figure.subplots(1, 2)
    for arm, tokens, values in _curves_of(data, data.curves, "val/main_loss"):
        band = 0.8 / (4 + len(data.colors))
        for ax, part in ((whole, tokens >= 0), (late, tokens >= tokens[-1] / 2)):
            _mean_and_band(data, ax, arm, tokens[part], values[:, part], band, marker=".")
    for ax, title in ((whole, "main validation loss (nats per token)"), (late, "the last half")):
        ax.set_title(title)
        _tokens(ax)
    return _with_legend(data, figure, marker=".")


def draw_effects(data: Data) -> Figure | None:
    """One panel per metric; metrics without an interval are left out."""
    primary = data.study.primary
    groups: dict[str, list[Effect]] = {}
    for effect in data.effects:
        if effect.interval is not None and effect.interval.n > 1:
            groups.setdefault(effect.metric, []).append(effect)
    if not groups:
        return None
    rows = sum(len(group) for group in groups.values())
    figure = Figure(figsize=(11, 1.0 * len(groups) + 0.34 * rows + 0.4), layout="constrained")
    heights = [2 + len(group) for group in groups.values()]
    axes = figure.subplots(len(groups), 1, height_ratios=heights, squeeze=False)[:, 0]
    for ax, (metric, group) in zip(axes, groups.items(), strict=True):
        for y, effect in enumerate(reversed(group)):
            i, color = effect.interval, "#1a1a1a" if is_primary(data.study, effect) else "#0072b2"
            # whose t interval may leave out 0 where Fisher's test finds nothing
            if metric != "task/solved":
                ax.plot([i.low, i.high], [y, y], color=color, lw=2)  # type: ignore[union-attr]
            ax.plot([i.mean], [y], "o", color=color)  # type: ignore[union-attr]
        ax.axvline(0, color="#8c8c8c", lw=1)
        if metric == primary.metric:
            ax.axvspan(-primary.margin, primary.margin, color="#8c8c8c", alpha=0.15, lw=0)
        labels = [f"{e.arm} - {e.against}  ({e.comparison})" for e in reversed(group)]
        ax.set_yticks(range(len(group)), labels)
        ax.set_ylim(-0.7, len(group) - 0.3)
        words, better = describe_metric(metric)
        ax.set_title(words + (f" ({better} is better)" if better else ""))
    return figure


def draw_depths(data: Data) -> Figure | None:
    families = {
        "val/mtp_loss": "loss of depth k, teacher-forced",
        "acceptance/T0/joint": "drafts 1..k accepted, greedy",
        "acceptance/T1/joint": "drafts 1..k accepted, T = 1",
    }
    runs = [
        r["metrics"]
        for arm in data.colors
        for r in data.table.get(arm, {}).values()
        if r.get("metrics")
    ]
    shown = {
        family: set[int]().union(*(depths_of(run, family) for run in runs)) for family in families
    }
    families = {family: title for family, title in families.items() if shown[family]}
    if not families:
        return None
    figure = Figure(figsize=(1 + 4 * len(families), 4.6), layout="constrained")
    axes = figure.subplots(1, len(families), squeeze=False)[0]
    for ax, (family, title) in zip(axes, families.items(), strict=True):
        for n, (arm, color) in enumerate(data.colors.items()):
            first = next((r for r in data.table.get(arm, {}).values() if r.get("metrics")), None)
            depths = depths_of(first["metrics"], family) if first else []
            values = [list(values_of(data.table, arm, f"{family}/{k}").values()) for k in depths]
            if values and all(values):
                at = np.array(depths) + 0.03 * (n - len(data.colors) / 2)
                half = [t_interval(v).high - np.mean(v) if len(v) > 1 else 0.0 for v in values]
                ax.errorbar(
                    at, [np.mean(v) for v in values], half, color=color, marker="o", ms=4, label=arm
                )
        ax.set_title(title)
        ax.set_xlabel("depth k")
        ax.set_xticks(sorted(shown[family]))
        if family != "val/mtp_loss":
            ax.set_ylim(0, 1)
    return _with_legend(data, figure, marker="o")


def draw_tradeoff(data: Data) -> Figure | None:
    figure = Figure(figsize=(12, 5), layout="constrained")
    for ax, temperature in zip(figure.subplots(1, 2), (0, 1), strict=True):
        metric = f"acceptance/T{temperature}/tokens_per_step"
        for arm, color in data.colors.items():
            loss, drafts = (
                values_of(data.table, arm, "val/main_loss"),
                values_of(data.table, arm, metric),
            )
            points = np.array(
                [(drafts[seed], loss[seed]) for seed in drafts if seed in loss]
            ).reshape(-1, 2)
            if len(points):
                ax.plot(*points.T, ".", color=color, alpha=0.5)
                ax.plot(*points.mean(0), "o", color=color, ms=9, label=arm)
        ax.set_title("greedy" if temperature == 0 else "temperature 1")
        ax.set_xlabel("tokens per step, free-running")
        ax.set_ylabel("main validation loss")
    return _with_legend(data, figure, marker="o", ls="")


def draw_lambda(data: Data) -> Figure | None:
    """Only where arms differ in it; each depth's share only where some arm has several depths."""
    progress = np.linspace(0.0, 1.0, 401).tolist()
    several = any(config.mtp.depths > 1 for config in data.configs.values())
    figure = Figure(figsize=(12 if several else 9, 4.6), layout="constrained")
    axes = figure.subplots(1, 1 + several, squeeze=False)[0]
    shapes = set()
    for arm, color in data.colors.items():
        mtp = data.configs[arm].mtp
        if mtp.depths:
            weights = np.array([depth_loss_weights(mtp, p) for p in progress])
            values = [mtp_loss_weight(mtp.loss_weight, p) for p in progress]
            shapes.add((tuple(values), weights.tobytes()))
            axes[0].plot(progress, values, color=color, label=arm)
            for column in weights.T if several else []:
                axes[1].plot(progress, column, color=color, alpha=0.7)
    for ax, title in zip(
        axes, ("lambda", "factor of each depth's loss, lambda / D * w_k"), strict=False
    ):
        ax.set_title(title)
        ax.set_xlabel("fraction of the training tokens")
        ax.set_yscale("symlog", linthresh=0.1)
        ax.set_yticks([0, 0.03, 0.1, 0.3, 1], ["0", "0.03", "0.1", "0.3", "1"])
        ax.set_ylim(bottom=0)
    return _with_legend(data, figure) if len(shapes) > 1 else None


def draw_balance(data: Data) -> Figure | None:
    figure = Figure(figsize=(12, 4.6), layout="constrained")
    keys = {"moe/max_violation": "trunk's routers", "moe/mtp_max_violation/1": "first MTP router"}
    for ax, (key, title) in zip(figure.subplots(1, 2), keys.items(), strict=True):
        for arm, tokens, values in _curves_of(data, data.curves, key):
            width = max(1, len(tokens) // 12)
            smooth = np.convolve(values.mean(0), np.ones(width) / width, "valid")
            ax.plot(tokens[width - 1 :], smooth, color=data.colors[arm], label=arm)
        ax.set_title(f"MaxVio, {title}")
        ax.set_ylim(bottom=0)
        _tokens(ax)
    return _with_legend(data, figure)


def draw_loss_errors(data: Data) -> Figure | None:
    errors: dict[str, dict[int, Any]] = {}
    for arm, seed, reference in references(data.study, data.curves):
        if data.curves[arm][seed] is not reference:
            of_run = loss_errors(data.curves[arm][seed], reference)
            errors.setdefault(arm, {})[seed] = [
                {"tokens": t, k: e} for k, curve in of_run.items() for t, e in curve.items()
            ]
    figure = Figure(figsize=(12, 5), layout="constrained")
    keys = {"train/main_loss": "main loss", "train/mtp_loss/1": "loss of the first MTP depth"}
    for ax, (key, title) in zip(figure.subplots(1, 2, sharey=True), keys.items(), strict=True):
        ax.axhspan(-0.25, 0.25, color="#8c8c8c", alpha=0.2, lw=0)
        for arm, tokens, values in _curves_of(data, errors, key):
            _mean_and_band(data, ax, arm, tokens, values, 0.1)
        ax.set_title(f"relative error of the {title}, %")
        _tokens(ax)
    return _with_legend(data, figure)


def draw_solved(data: Data) -> Figure | None:
    figure = Figure(figsize=(8, 4.6), layout="constrained")
    ax = figure.subplots()
    for arm, color in data.colors.items():
        runs = [r for r in data.table.get(arm, {}).values() if "solved_at" in r]
        if runs:
            curve = solve_curve([r["solved_at"] for r in runs], [r["tokens"] for r in runs])
            end = max(r["tokens"] for r in runs)
            ax.step([0, *curve.times, end], [1, *curve.unsolved, (1, *curve.unsolved)[-1]], where="post", color=color,
                    label=f"{arm} (n = {len(runs)})")  # fmt: skip
    ax.set_title("share of seeds still unsolved")
    ax.set_ylim(-0.03, 1.03)
    _tokens(ax)
    figure.legend(*ax.get_legend_handles_labels(), loc="outside right upper")
    return figure if ax.lines else None


def _curves_of(
    data: Data, curves: Curves, key: str
) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Of every arm that has any: tokens (n,) that all of its seeds have logged, and values (seeds,
    n).
    """
    for arm in data.colors:
        series = [
            {r["tokens"]: r[key] for r in records if key in r}
            for records in curves.get(arm, {}).values()
        ]
        series = [values for values in series if values]
        common = sorted(set.intersection(*(set(values) for values in series))) if series else []
        if common:
            yield (
                arm,
                np.array(common),
                np.array([[values[t] for t in common] for values in series]),
            )


def _mean_and_band(
    data: Data,
    ax: Axes,
    arm: str,
    tokens: np.ndarray,
    values: np.ndarray,
    alpha: float,
    **style: Any,
):
    """values: (seeds, n)."""
    color = data.colors[arm]
    ax.plot(tokens, values.mean(0), color=color, label=arm, **style)
    ax.fill_between(tokens, values.min(0), values.max(0), color=color, alpha=alpha, lw=0)


def _with_legend(data: Data, figure: Figure, **style: Any) -> Figure | None:
    """The figure with a legend of the arms in it; None if there is none."""
    shown = {label for ax in figure.axes for label in ax.get_legend_handles_labels()[1]}
    handles = [
        Line2D([], [], color=color, label=arm, **style)
        for arm, color in data.colors.items()
        if arm in shown
    ]
    figure.legend(handles=handles, loc="outside right upper")
    return figure if shown else None


def _tokens(ax: Axes) -> None:
    ax.xaxis.set_major_formatter(lambda value, _: short_number(value))
    ax.set_xlabel("tokens")
