"""The figures of a study's report. Each arm keeps its colour; lines are means over seeds, bands their range."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from dsv3_mtp.config import Config
from dsv3_mtp.metrics import Record, depths_of
from dsv3_mtp.plots import STYLE, save_figure, short_number
from dsv3_mtp.schedules import depth_loss_weights, mtp_loss_weight
from dsv3_mtp.study.findings import Effect, Table, describe_metric, references, values_of
from dsv3_mtp.study.matrix import Primary, Study
from dsv3_mtp.study.measure import loss_errors
from dsv3_mtp.study.stats import solve_curve, t_interval

# Okabe and Ito's colours, then darker ones of the same hues: as many arms as a study has.
COLORS = ("#1a1a1a", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c8c8c", "#004c77", "#8f3f00",
          "#00694d", "#8a4f70", "#9a6b00")  # fmt: skip
Curves = Mapping[str, Mapping[int, Sequence[Record]]]  # arm -> seed -> metrics.jsonl


def draw_all(study: Study, configs: Mapping[str, Config], table: Table, curves: Curves, effects: list[Effect]) -> list:
    """Writes the PNG files that the data allow into the study's folder; returns [(file, caption)]."""
    folder, arms = study.folder, {arm: COLORS[n % len(COLORS)] for n, arm in enumerate(study.arms)}
    wanted: list[tuple[str, str, Callable[[Path], bool]]] = [
        (
            "loss.png",
            "Main loss of every arm on the same validation windows: mean over seeds, band from the lowest to the "
            "highest seed. Left the whole run, right the last half.",
            lambda out: draw_losses(out, curves, arms),
        ),
        (
            "effects.png",
            "Paired differences with 95 % t intervals over seeds, the primary comparison in black. An interval that "
            "covers 0 is no detectable difference. Solve rates have no interval here: Fisher's test, in the table, "
            "decides.",
            lambda out: draw_effects(out, effects, study.primary),
        ),
        (
            "depths.png",
            "Per depth: teacher-forced loss, and acceptance of free-running drafts 1..k. Losses of heads that see "
            "other tokens must not be ranked against each other.",
            lambda out: draw_depths(out, table, arms),
        ),
        (
            "tradeoff.png",
            "Quality against drafting: main loss and tokens per step, free-running; small marks are seeds, large ones "
            "means.",
            lambda out: draw_tradeoff(out, table, arms),
        ),
        (
            "lambda.png",
            "Weight of the extra losses over training (logarithmic above 0.1): lambda, and each depth's share of it.",
            lambda out: draw_lambda(out, configs, arms),
        ),
        (
            "balance.png",
            "MaxVio, the relative overload of the busiest expert: mean of the trunk's routers, and of the first MTP "
            "router; smoothed.",
            lambda out: draw_balance(out, curves, arms),
        ),
        (
            "loss_error.png",
            f"Training losses relative to those of {study.loss_error_against}, smoothed with EMA 0.9 (V3 B.1): mean "
            "over seeds, band from the lowest to the highest seed; the grey band is +-0.25 %, V3's bound.",
            lambda out: draw_loss_errors(out, references(study, curves), curves, arms),
        ),
        (
            "solved.png",
            "Share of seeds that have not solved the task yet (Kaplan and Meier); runs that end unsolved are censored.",
            lambda out: draw_solved(out, table, arms),
        ),
    ]
    return [(name, caption) for name, caption, draw in wanted if draw(folder / name)]


def _mean_curves(curves: Curves, arm: str, key: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Tokens (n,) and values (seeds, n) at the tokens that every seed has logged."""
    series = [{r["tokens"]: r[key] for r in records if key in r} for records in curves.get(arm, {}).values()]
    series = [values for values in series if values]
    common = sorted(set.intersection(*(set(values) for values in series))) if series else []
    return (np.array(common), np.array([[s[t] for t in common] for s in series])) if common else None


@matplotlib.rc_context(STYLE)
def draw_losses(out: Path, curves: Curves, arms: Mapping[str, str]) -> bool:
    figure = Figure(figsize=(12, 5), layout="constrained")
    whole, late = figure.subplots(1, 2)
    last = 0
    for arm, color in arms.items():
        found = _mean_curves(curves, arm, "val/main_loss")
        if found:
            tokens, values = found
            last = max(last, tokens[-1])
            for ax, part in ((whole, tokens >= 0), (late, tokens >= tokens[-1] / 2)):
                ax.plot(tokens[part], values.mean(0)[part], color=color, label=arm, marker=".")
                ax.fill_between(
                    tokens[part],
                    values.min(0)[part],
                    values.max(0)[part],
                    color=color,
                    alpha=0.8 / (4 + len(arms)),
                    lw=0,
                )
    for ax, title in ((whole, "main validation loss (nats per token)"), (late, "the last half")):
        ax.set_title(title)
        _tokens(ax)
    figure.legend(*whole.get_legend_handles_labels(), loc="outside right upper")
    return _saved(figure, out, bool(last))


@matplotlib.rc_context(STYLE)
def draw_effects(out: Path, effects: Sequence[Effect], primary: Primary) -> bool:
    """One panel per metric; metrics without an interval are left out."""
    groups: dict[str, list[Effect]] = {}
    for effect in effects:
        if effect.interval is not None and effect.interval.n > 1:
            groups.setdefault(effect.metric, []).append(effect)
    rows = sum(len(group) for group in groups.values())
    figure = Figure(figsize=(11, 1.0 * len(groups) + 0.34 * rows + 0.4), layout="constrained")
    axes = np.atleast_1d(figure.subplots(max(len(groups), 1), 1, height_ratios=[2 + len(g) for g in groups.values()]
                                         or [1]))  # fmt: skip
    for ax, (metric, group) in zip(axes, groups.items(), strict=False):
        for y, effect in enumerate(reversed(group)):
            i, decides = effect.interval, (effect.comparison, metric) == (primary.comparison, primary.metric)
            color = "#1a1a1a" if decides else "#0072b2"
            if metric != "task/solved":  # whose t interval may leave out 0 where Fisher's test finds nothing
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
    return _saved(figure, out, bool(groups))


@matplotlib.rc_context(STYLE)
def draw_depths(out: Path, table: Table, arms: Mapping[str, str]) -> bool:
    families = ("val/mtp_loss", "acceptance/T0/joint", "acceptance/T1/joint")
    titles = ("loss of depth k, teacher-forced", "drafts 1..k accepted, greedy", "drafts 1..k accepted, T = 1")
    figure = Figure(figsize=(13, 4.6), layout="constrained")
    shown: set[str] = set()
    for ax, family, title in zip(figure.subplots(1, 3), families, titles, strict=True):
        for n, (arm, color) in enumerate(arms.items()):
            first = next((r for r in table.get(arm, {}).values() if r.get("metrics")), None)
            depths = depths_of(first["metrics"], family) if first else []
            values = [list(values_of(table, arm, f"{family}/{k}").values()) for k in depths]
            if values and all(values):
                shown.add(arm)
                at = np.array(depths) + 0.03 * (n - len(arms) / 2)
                half = [t_interval(v).high - np.mean(v) if len(v) > 1 else 0.0 for v in values]
                ax.errorbar(at, [np.mean(v) for v in values], half, color=color, marker="o", ms=4, label=arm)
        ax.set_title(title)
        ax.set_xlabel("depth k")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        if family != "val/mtp_loss":
            ax.set_ylim(0, 1)
    _legend(figure, arms, shown, marker="o")
    return _saved(figure, out, bool(shown))


@matplotlib.rc_context(STYLE)
def draw_tradeoff(out: Path, table: Table, arms: Mapping[str, str]) -> bool:
    figure = Figure(figsize=(12, 5), layout="constrained")
    shown: set[str] = set()
    for ax, temperature in zip(figure.subplots(1, 2), (0, 1), strict=True):
        metric = f"acceptance/T{temperature}/tokens_per_step"
        for arm, color in arms.items():
            loss, drafts = values_of(table, arm, "val/main_loss"), values_of(table, arm, metric)
            points = np.array([(drafts[seed], loss[seed]) for seed in drafts if seed in loss]).reshape(-1, 2)
            if len(points):
                shown.add(arm)
                ax.plot(*points.T, ".", color=color, alpha=0.5)
                ax.plot(*points.mean(0), "o", color=color, ms=9, label=arm)
        ax.set_title("greedy" if temperature == 0 else "temperature 1")
        ax.set_xlabel("tokens per step, free-running")
        ax.set_ylabel("main validation loss")
    _legend(figure, arms, shown, marker="o", ls="")
    return _saved(figure, out, bool(shown))


@matplotlib.rc_context(STYLE)
def draw_lambda(out: Path, configs: Mapping[str, Config], arms: Mapping[str, str]) -> bool:
    """Only where arms differ in it; each depth's share only where some arm has several depths."""
    progress = np.linspace(0.0, 1.0, 401).tolist()
    several = any(config.mtp.depths > 1 for config in configs.values())
    figure = Figure(figsize=(12 if several else 9, 4.6), layout="constrained")
    axes = np.atleast_1d(figure.subplots(1, 1 + several))
    shapes, handles = set(), []
    for arm, color in arms.items():
        mtp = configs[arm].mtp
        if mtp.depths:
            weights = np.array([depth_loss_weights(mtp, p) for p in progress])
            values = [mtp_loss_weight(mtp.loss_weight, p) for p in progress]
            shapes.add((tuple(values), weights.tobytes()))
            handles += axes[0].plot(progress, values, color=color, label=arm)
            for column in weights.T if several else []:
                axes[1].plot(progress, column, color=color, alpha=0.7)
    for ax, title in zip(axes, ("lambda", "factor of each depth's loss, lambda / D * w_k"), strict=False):
        ax.set_title(title)
        ax.set_xlabel("fraction of the training tokens")
        ax.set_yscale("symlog", linthresh=0.1)
        ax.set_yticks([0, 0.03, 0.1, 0.3, 1], ["0", "0.03", "0.1", "0.3", "1"])
        ax.set_ylim(bottom=0)
    figure.legend(handles=handles, loc="outside right upper")
    return _saved(figure, out, len(shapes) > 1)


@matplotlib.rc_context(STYLE)
def draw_balance(out: Path, curves: Curves, arms: Mapping[str, str]) -> bool:
    figure = Figure(figsize=(12, 4.6), layout="constrained")
    shown: set[str] = set()
    keys = {"moe/max_violation": "trunk's routers", "moe/mtp_max_violation/1": "first MTP router"}
    for ax, (key, title) in zip(figure.subplots(1, 2), keys.items(), strict=True):
        for arm, color in arms.items():
            if found := _mean_curves(curves, arm, key):
                shown.add(arm)
                tokens, values = found
                width = max(1, len(tokens) // 12)
                smooth = np.convolve(values.mean(0), np.ones(width) / width, "valid")
                ax.plot(tokens[width - 1 :], smooth, color=color, label=arm)
        ax.set_title(f"MaxVio, {title}")
        ax.set_ylim(bottom=0)
        _tokens(ax)
    _legend(figure, arms, shown)
    return _saved(figure, out, bool(shown))


@matplotlib.rc_context(STYLE)
def draw_loss_errors(out: Path, pairs: list[tuple[str, int, Sequence[Record]]], curves: Curves, arms: Mapping) -> bool:
    errors: dict[str, dict[int, Any]] = {}
    for arm, seed, reference in pairs:
        if curves[arm][seed] is not reference:
            of_run = loss_errors(curves[arm][seed], reference)
            errors.setdefault(arm, {})[seed] = [
                {"tokens": t, k: e} for k, curve in of_run.items() for t, e in curve.items()
            ]
    figure = Figure(figsize=(12, 5), layout="constrained")
    shown: set[str] = set()
    keys = {"train/main_loss": "main loss", "train/mtp_loss/1": "loss of the first MTP depth"}
    for ax, (key, title) in zip(figure.subplots(1, 2, sharey=True), keys.items(), strict=True):
        ax.axhspan(-0.25, 0.25, color="#8c8c8c", alpha=0.2, lw=0)
        for arm, color in arms.items():
            if found := _mean_curves(errors, arm, key):
                shown.add(arm)
                tokens, values = found
                ax.plot(tokens, values.mean(0), color=color)
                ax.fill_between(tokens, values.min(0), values.max(0), color=color, alpha=0.1, lw=0)
        ax.set_title(f"relative error of the {title}, %")
        _tokens(ax)
    _legend(figure, arms, shown)
    return _saved(figure, out, bool(shown))


@matplotlib.rc_context(STYLE)
def draw_solved(out: Path, table: Table, arms: Mapping[str, str]) -> bool:
    figure = Figure(figsize=(8, 4.6), layout="constrained")
    ax = figure.subplots()
    drawn = False
    for arm, color in arms.items():
        runs = [r for r in table.get(arm, {}).values() if "solved_at" in r]
        if runs:
            drawn = True
            curve = solve_curve([r["solved_at"] for r in runs], [r["tokens"] for r in runs])
            end = max(r["tokens"] for r in runs)
            ax.step([0, *curve.times, end], [1, *curve.unsolved, (1, *curve.unsolved)[-1]], where="post", color=color,
                    label=f"{arm} (n = {len(runs)})")  # fmt: skip
    ax.set_title("share of seeds still unsolved")
    ax.set_ylim(-0.03, 1.03)
    _tokens(ax)
    figure.legend(*ax.get_legend_handles_labels(), loc="outside right upper")
    return _saved(figure, out, drawn)


def _legend(figure: Figure, arms: Mapping[str, str], shown: set[str], **style: Any) -> None:
    handles = [Line2D([], [], color=color, label=arm, **style) for arm, color in arms.items() if arm in shown]
    figure.legend(handles=handles, loc="outside right upper")


def _tokens(ax: Axes) -> None:
    ax.xaxis.set_major_formatter(lambda value, _: short_number(value))
    ax.set_xlabel("tokens")


def _saved(figure: Figure, out: Path, drawn: bool) -> bool:
    """A picture without data is not written, and an old one of it is removed."""
    if drawn:
        save_figure(figure, out)
    else:
        out.unlink(missing_ok=True)
    return drawn
