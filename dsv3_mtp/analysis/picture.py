"""One picture of an analysis: loss by class, overlap by entropy, probes, gradients or routers."""

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dsv3_mtp.analysis.analyse import Analysis
from dsv3_mtp.analysis.groups import Groups
from dsv3_mtp.analysis.intervals import Estimate
from dsv3_mtp.report.plots import COLORS, GREY, STYLE, save_figure


@matplotlib.rc_context(STYLE)
def draw(found: Analysis, out: Path) -> None:
    """Writes the PNG file `out`."""
    figure = Figure(figsize=(12, 8.5), dpi=110, layout="constrained")
    axes = list(figure.subplots(2, 2).flat)
    figure.suptitle(f"{found.run} on {found.data}", x=0.01, ha="left", fontweight="bold")
    _losses(axes[0], found.groups.get("class", {}))
    _overlaps(axes[1], found.groups["entropy"])
    _probes(axes[2], found)
    if found.gradients or not found.routers:
        _angles(axes[3], found)
    else:
        _routers(axes[3], found)
    save_figure(figure, out)


def _losses(ax: Axes, groups: Groups) -> None:
    ax.set_title("Loss by the class of the target, nats")
    if not groups:
        _nothing(ax, "no token classes: there is no tokenizer")
        return
    names = sorted(groups, key=lambda name: -groups[name]["share"].mean)
    labels = [f"{name} ({groups[name]['share'].mean:.0%})" for name in names]
    places = range(len(names))
    for place, name in enumerate(names):
        row = groups[name]
        _bar(ax, place, row["main_loss"], color=COLORS[0])
        if "trigram" in row:
            ax.plot(row["trigram"].mean, place, marker="|", color=GREY, markersize=14, mew=2.5)
    ax.set_yticks(places, labels)
    ax.invert_yaxis()
    # an interval over two windows may be of any length
    ax.set_xlim(0, 1.3 * max(row["main_loss"].mean for row in groups.values()))
    if any("trigram" in row for row in groups.values()):
        ax.set_xlabel("dot: main head, 95 % interval over windows; grey bar: trigram table")


def _overlaps(ax: Axes, groups: Groups) -> None:
    ax.set_title("Overlap by the entropy of the main head")
    depths = sorted({k for row in groups.values() for k in row if k.startswith("overlap/")})
    if not depths:
        _nothing(ax, "the model has no heads, or none that drafts")
        return
    places = np.arange(len(groups))
    for number, key in enumerate(depths, start=1):
        color, depth = COLORS[number % len(COLORS)], key.partition("/")[2]
        for name, style in ((key, "-"), (f"table/{depth}", ":")):
            found: Any = [row.get(name) for row in groups.values()]
            if any(found):
                values = [np.nan if x is None else x.mean for x in found]
                halves = [0.0 if x is None or x.half is None else x.half for x in found]
                label = f"depth {depth}" if style == "-" else f"table drafter {depth}"
                ax.errorbar(places, values, halves, color=color, linestyle=style, label=label)
    ax.set_xticks(places, list(groups))
    ax.set_xlabel("nats")
    ax.set_ylim(0, 1)
    ax.legend()


def _probes(ax: Axes, found: Analysis) -> None:
    ax.set_title("Linear probes of the trunk's last state, nats")
    if not found.probes:
        _nothing(ax, "no probes (see the notes)")
        return
    styles = {"probe": (COLORS[1], "-"), "table": (GREY, "-"), "unigram": (GREY, ":")}
    offsets = list(found.probes)
    for name, (color, style) in styles.items():
        values = [found.probes[k][name] for k in offsets]
        halves = [x.half or 0.0 for x in values]
        ax.errorbar(
            offsets, [x.mean for x in values], halves, color=color, linestyle=style, label=name
        )
    ax.set_xticks(offsets, [f"t+{k}" for k in offsets])
    ax.legend()


def _angles(ax: Axes, found: Analysis) -> None:
    ax.set_title("Cosine of the heads' and the main loss's gradient")
    if not found.gradients:
        _nothing(ax, "not logged (log.gradients)")
        return
    for row in found.gradients:
        middle = (row["from"] + row["to"]) / 2
        ax.vlines(middle, row["lowest"], row["highest"], color=GREY)
        ax.plot(middle, row["cosine"], marker="o", color=COLORS[1])
    ax.axhline(0, color=GREY, linewidth=1)
    ax.set_xlim(0, 1)
    ax.set_xlabel("part of the run; mean, lowest and highest of each quarter")


def _routers(ax: Axes, found: Analysis) -> None:
    ax.set_title("Experts that a head shares with a trunk layer, after matching")
    for place, one in enumerate(found.routers):
        _bar(ax, place, one.share, color=COLORS[one.depth % len(COLORS)])
        ax.plot(one.independent, place, marker="|", color=GREY, markersize=14, mew=2.5)
    labels = [f"depth {one.depth}, layer {one.layer}" for one in found.routers]
    ax.set_yticks(range(len(labels)), labels)
    ax.invert_yaxis()
    ax.set_xlim(0, 1)
    ax.set_xlabel("dot: share, 95 % interval over windows; grey bar: independent routers")


def _bar(ax: Axes, place: float, value: Estimate, **style: Any) -> None:
    ax.errorbar(value.mean, place, xerr=value.half or 0.0, marker="o", linestyle="", **style)


def _nothing(ax: Axes, why: str) -> None:
    ax.text(0.5, 0.5, why, ha="center", va="center", color=GREY, transform=ax.transAxes)
    ax.set_axis_off()
    ax.set_title(ax.get_title(loc="left"), loc="left")
