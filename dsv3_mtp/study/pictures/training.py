"""Pictures over training: main loss, lambda, expert balance, loss errors."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from dsv3_mtp.config.schedules import mtp_loss_weight
from dsv3_mtp.study.findings import LOSS, references, values_of
from dsv3_mtp.study.measure import loss_errors
from dsv3_mtp.study.pictures.base import PictureData, Series, mean_and_band, token_axis, with_legend
from dsv3_mtp.study.stats import t_interval


def draw_losses(data: PictureData) -> Figure | None:
    curves, differences = data.curves(LOSS), data.over_reference()
    if data.reference not in curves:
        return None
    figure = Figure(figsize=(12, 5), layout="constrained")
    axes = figure.subplots(1, 1 + bool(differences), squeeze=False)[0]
    base = curves[data.reference]
    mean_and_band(data, axes[0], data.reference, base, 0.2)
    axes[0].set_title(f"main validation loss of {data.reference} (nats per token)")
    for name, style in (("unigram", ":"), ("bigram", "--"), ("trigram", "-.")):
        floor = list(values_of(data.table, data.reference, f"val/floor/{name}").values())
        if floor:
            axes[0].axhline(np.mean(floor), color="#8c8c8c", ls=style, lw=1.2)
            place = (base.tokens[0], np.mean(floor))
            axes[0].annotate(f"{name} table", place, fontsize=8, va="bottom")
    token_axis(axes[0])
    if differences:
        ax = axes[1]
        ax.axhline(0, color=data.colors[data.reference], lw=1)
        for n, (arm, (tokens, values, _)) in enumerate(differences.items()):
            # the first steps, where losses fall fast, would set the scale
            late = tokens >= tokens[-1] / 5
            ax.plot(tokens[late], values.mean(0)[late], label=arm, **data.style(arm, ms=4))
            if len(values) > 1:
                i = t_interval(values[:, -1].tolist())
                x = tokens[-1] * (1.02 + 0.012 * n)
                ax.plot([x, x], [i.low, i.high], color=data.colors[arm], lw=2)
        ax.set_title(f"main loss minus that of {data.reference}")
        note: Any = {"xycoords": "axes fraction", "fontsize": 9, "color": "#555555"}
        ax.annotate("\N{DOWNWARDS ARROW} better", (0.01, 0.01), **note)
        token_axis(ax)
    return with_legend(data, figure)


def draw_lambda(data: PictureData) -> Figure | None:
    """Only where arms differ in it; equal schedules are drawn once and named together."""
    progress = np.linspace(0.0, 1.0, 1001).tolist()
    shapes: dict[tuple[float, ...], list[str]] = {}
    for arm in data.colors:
        mtp = data.configs[arm].mtp
        if mtp.depths and data.table[arm]:
            curve = tuple(mtp_loss_weight(mtp.loss_weight, p) for p in progress)
            shapes.setdefault(curve, []).append(arm)
    if len(shapes) < 2:
        return None
    figure = Figure(figsize=(9, 4.6), layout="constrained")
    ax = figure.subplots()
    for n, (curve, arms) in enumerate(shapes.items()):
        style = data.style(arms[0], markevery=(30 * n % 100, 100))
        ax.plot(progress, curve, label="\n".join(arms), **style)
    ax.set_title("lambda")
    ax.set_xlabel("fraction of the training tokens")
    ax.set_ylim(bottom=0)
    figure.legend(*ax.get_legend_handles_labels(), loc="outside right upper")
    return figure


def draw_balance(data: PictureData) -> Figure | None:
    keys = {"moe/max_violation": "trunk's routers", "moe/mtp_max_violation/1": "first MTP router"}
    panels = {title: found for key, title in keys.items() if (found := data.curves(key))}
    if not panels:
        return None
    figure = Figure(figsize=(2 + 5 * len(panels), 4.6), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for ax, (title, found) in zip(axes, panels.items(), strict=True):
        first, *others = found.values()
        if others and all(np.array_equal(first.values, other.values) for other in others):
            title, found = f"{title} (the same in all arms)", dict(list(found.items())[:1])
        for arm, (tokens, values, _) in found.items():
            width = max(1, len(tokens) // 12)
            smooth = np.convolve(values.mean(0), np.ones(width) / width, "valid")
            ax.plot(tokens[width - 1 :], smooth, label=arm, **data.style(arm, markevery=0.15))
        ax.set_title(f"MaxVio, {title}")
        ax.set_ylim(bottom=0)
        token_axis(ax)
    return with_legend(data, figure)


def draw_loss_errors(data: PictureData) -> Figure | None:
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
            mean_and_band(data, ax, arm, Series(np.array(common), values, []), 0.1)
        ax.set_title(f"relative error of the {keys[key]}, %")
        token_axis(ax)
    return with_legend(data, figure)
