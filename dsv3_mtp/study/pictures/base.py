"""What all pictures share: the data, each arm's colour and marker, axes and legends."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from dsv3_mtp.config import Config
from dsv3_mtp.report import plots
from dsv3_mtp.report.plots import short_number
from dsv3_mtp.study.alarms import primary_arms
from dsv3_mtp.study.archive import Table
from dsv3_mtp.study.findings import LOSS, Effect
from dsv3_mtp.study.matrix import Study
from dsv3_mtp.study.metric_names import is_rate_over_seeds

# Okabe and Ito's colours, then darker ones of the same hues: as many arms as a study has.
COLORS = (*plots.COLORS, plots.GREY, "#004c77", "#8f3f00", "#00694d", "#8a4f70", "#9a6b00")
MARKERS = "osD^vPX<>*hpd"


class Series(NamedTuple):
    """One logged metric of all runs of an arm."""

    tokens: np.ndarray
    """(n,): those that all of its seeds have logged."""
    values: np.ndarray
    """(seeds, n)"""
    seeds: list[int]


@dataclass(frozen=True)
class PictureData:
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

    def style(self, arm: str, **more: Any) -> dict[str, Any]:
        """Of a line with marks."""
        return {"color": self.colors[arm], "marker": self.markers[arm], "ms": 5} | more

    @cached_property
    def legible(self) -> "PictureData":
        """Of more arms than there are colours, those of the primary comparison; and every effect on
        the main loss, whose rows have names.
        """
        if sum(bool(seeds) for seeds in self.table.values()) <= len(COLORS):
            return self
        arms = primary_arms(self.study)
        study = self.study.model_copy(update={"arms": {a: self.study.arms[a] for a in arms}})
        table = {arm: self.table[arm] for arm in arms}
        effects = [e for e in self.effects if {e.arm, e.against} <= {*arms} or e.metric == LOSS]
        return replace(self, study=study, table=table, effects=effects)

    @property
    def reference(self) -> str:
        """The arm that the primary comparison measures against."""
        return self.study.comparisons[self.study.primary.comparison].against

    def curves(self, key: str) -> dict[str, Series]:
        """Arm -> its runs' logged `key`, of every arm that has any."""
        found = {}
        for arm in self.colors:
            logged = [record for record in self.table[arm].values() if key in record.curves]
            runs = {record.seed: dict(record.curves[key].points) for record in logged}
            common = sorted(set.intersection(*map(set, runs.values()))) if runs else []
            if common:
                values = np.array([[run[t] for t in common] for run in runs.values()])
                found[arm] = Series(np.array(common), values, list(runs))
        return found

    def over_reference(self) -> dict[str, Series]:
        """Main loss minus that of the reference arm, paired by seed, at the tokens of both. Arms
        whose loss is the same throughout, such as heads on a frozen trunk, are left out.
        """
        curves = self.curves(LOSS)
        base, found = curves.pop(self.reference, None), {}
        for arm, ours in curves.items() if base else ():
            assert base is not None
            seeds = [seed for seed in ours.seeds if seed in base.seeds]
            common, left, right = np.intersect1d(ours.tokens, base.tokens, return_indices=True)
            if seeds and len(common):
                a = ours.values[[ours.seeds.index(s) for s in seeds]][:, left]
                b = base.values[[base.seeds.index(s) for s in seeds]][:, right]
                if (a != b).any():
                    found[arm] = Series(common, a - b, seeds)
        return found


def draw_interval(ax: Axes, y: float, effect: Effect, color: str, marker: str) -> None:
    i = effect.interval
    if i is None:
        return
    if i.n > 1 and not is_rate_over_seeds(effect.metric):
        # a solve rate's t interval may leave out 0 where McNemar's test finds nothing
        ax.plot([i.low, i.high], [y, y], color=color, lw=2.5)
    ax.plot([i.mean], [y], marker, color=color, ms=8)


def mark_better(ax: Axes, better: str | None) -> None:
    if better == "higher":
        ax.set_title("better \N{RIGHTWARDS ARROW}", loc="right", fontsize=9, color="#555555")
    elif better:
        ax.set_title("\N{LEFTWARDS ARROW} better", loc="left", fontsize=9, color="#555555")


def mean_and_band(data: PictureData, ax: Axes, arm: str, series: Series, alpha: float) -> None:
    (tokens, values, _), style = series, data.style(arm, ms=4, markevery=0.1)
    ax.plot(tokens, values.mean(0), label=arm, **style)
    ax.fill_between(tokens, values.min(0), values.max(0), color=style["color"], alpha=alpha, lw=0)


def with_legend(data: PictureData, figure: Figure) -> Figure:
    """A legend of the arms that are drawn, in their order."""
    shown = {label for ax in figure.axes for label in ax.get_legend_handles_labels()[1]}
    arms = [arm for arm in data.colors if arm in shown]
    handles = [Line2D([], [], label=arm, **data.style(arm)) for arm in arms]
    figure.legend(handles=handles, loc="outside right upper")
    return figure


def token_axis(ax: Axes) -> None:
    ax.xaxis.set_major_locator(MaxNLocator(6))
    ax.xaxis.set_major_formatter(lambda value, _: short_number(value))
    ax.set_xlabel("tokens")
