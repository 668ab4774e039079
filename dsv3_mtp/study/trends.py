"""Slopes: how an effect changes with the logarithm of length or size, and whether its sign does.

In every seed a line is fitted to the paired differences of all sizes (least squares, each size
once). Slopes, and the lines' ends at the smallest and the largest size, are then means over seeds
with t intervals, as any other effect is: seeds are what is drawn independently.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean

import numpy as np

from dsv3_mtp.report.progress import quantity
from dsv3_mtp.study import stats
from dsv3_mtp.study.archive import Table
from dsv3_mtp.study.findings import ALPHA, FEWEST, paired
from dsv3_mtp.study.matrix import Study
from dsv3_mtp.study.page import Element, Heading, Paragraph, Rows
from dsv3_mtp.study.power import detectable
from dsv3_mtp.study.stats import Interval
from dsv3_mtp.study.trend_key import Trend


@dataclass(frozen=True)
class Slope:
    """One trend of a study. None: no seed has all of its runs."""

    name: str
    by: str
    sizes: tuple[float, ...]  # of the comparisons, from the smallest
    slope: Interval | None  # change of the effect per tenfold size
    first: Interval | None  # the line at the smallest size
    last: Interval | None  # and at the largest
    adjusted_p: float = 1.0  # Holm over all trends of the study

    @property
    def crossing(self) -> float | None:
        """Where the mean line crosses 0, if that is between the sizes."""
        if self.first is None or self.last is None or self.first.mean * self.last.mean >= 0:
            return None
        part = self.first.mean / (self.first.mean - self.last.mean)
        low, high = math.log(self.sizes[0]), math.log(self.sizes[-1])
        return math.exp(low + part * (high - low))

    @property
    def changes_sign(self) -> bool:
        """The intervals at both ends leave out 0, on other sides of it."""
        if self.first is None or self.last is None:
            return False
        ends = (self.first, self.last)
        return self.crossing is not None and not any(end.covers_zero for end in ends)

    @property
    def reading(self) -> str:
        if self.slope is None or self.slope.n < FEWEST:
            return "too few seeds"
        if self.slope.covers_zero or self.adjusted_p >= ALPHA:
            hint = "" if self.slope.covers_zero else "a hint only: "
            return f"{hint}no change with {self.by} is shown"
        direction = "rises" if self.slope.mean > 0 else "falls"
        if self.changes_sign:
            return f"{direction}, and changes sign"
        return f"{direction}; a change of sign is not shown"


def slopes_of(study: Study, table: Table) -> list[Slope]:
    found = [_slope(study, table, name, trend) for name, trend in study.trends.items()]
    adjusted = stats.holm({s.name: s.slope.p for s in found if s.slope is not None})
    return [replace(slope, adjusted_p=adjusted.get(slope.name, 1.0)) for slope in found]


def _slope(study: Study, table: Table, name: str, trend: Trend) -> Slope:
    metric, points = study.primary.metric, []
    for arm, against in trend.members(study.comparisons):
        points.append((_size(table, against, trend.by), paired(table, arm, against, metric)))
    if not all(size for size, _ in points):  # an arm has not been run at all
        return Slope(name, trend.by, (), None, None, None)
    points.sort(key=lambda point: point[0])
    sizes = tuple(size for size, _ in points)
    seeds = [s for s in study.seeds if all(s in values for _, values in points)]
    if not seeds or len(set(sizes)) < 2:
        return Slope(name, trend.by, sizes, None, None, None)
    x = np.log10(sizes)
    y = np.array([[values[seed] for seed in seeds] for _, values in points])  # (sizes, seeds)
    slope, start = np.polyfit(x, y, 1)  # of each seed
    fitted = (slope, start + slope * x[0], start + slope * x[-1])
    per_decade, first, last = (stats.t_interval(part.tolist()) for part in fitted)
    return Slope(name, trend.by, sizes, per_decade, first, last)


def _size(table: Table, arm: str, by: str) -> float:
    """0 where none of its runs has finished."""
    records = [record for record in table.get(arm, {}).values() if record.finished]
    if by == "tokens":
        return fmean(record.tokens for record in records) if records else 0.0
    return float(records[0].parameters["inference"]) if records else 0.0


def blocks(slopes: Sequence[Slope]) -> list[Element]:
    """The table of the report; nothing where the study has no trends."""
    if not slopes:
        return []
    rows = []
    for one in slopes:
        sizes = " to ".join(quantity(int(one.sizes[place])) for place in (0, -1) if one.sizes)
        n = "0" if one.slope is None else str(one.slope.n)
        cells = [i.signed if i else "-" for i in (one.slope, one.first, one.last)]
        p = f"{one.adjusted_p:.2g}" if one.slope is not None and one.slope.n > 1 else "-"
        cross = "-" if one.crossing is None else quantity(int(one.crossing))
        rows.append([one.name, f"{sizes or '-'} {one.by}", n, *cells, p, cross, one.reading])
    header = ["trend", "from, to", "n", "slope per tenfold", "at the smallest", "at the largest"]
    return [
        Heading("Trends"),
        Rows([*header, "p (Holm)", "crosses 0 at", "reading"], rows),
        Paragraph(
            "Of the primary metric: a line in the logarithm of the size, fitted to the paired "
            "differences of every seed that has all of the sizes; means over seeds with 95 % t "
            "intervals. A change of sign is shown where the intervals at both ends leave out 0 on "
            "other sides. A line is all that is fitted: between and beyond the sizes it can bend."
        ),
    ]


def sentences(slopes: Sequence[Slope]) -> list[str]:
    """For the answer of the report."""
    found = []
    for one in slopes:
        i = one.slope
        if i is None or i.n < FEWEST:
            count = "none" if i is None else i.n
            found.append(f"Trend {one.name}: {count} of the seeds has all sizes, no conclusion.")
        else:
            size = f"{i.mean:+.3g} [{i.low:+.3g}, {i.high:+.3g}] per tenfold {one.by}, n = {i.n}"
            found.append(f"Trend {one.name}: {one.reading} ({size}).")
    return found


def detectable_lines(study: Study, sizes: dict[str, tuple[float, float]]) -> list[str]:
    """For --dry-run: the smallest slope that is found, where every comparison of a trend gives its
    standard deviation and these are independent from size to size.

    sizes: arm -> (tokens, parameters without heads).
    """
    lines = []
    for name, trend in study.trends.items():
        metric, place = study.primary.metric, 0 if trend.by == "tokens" else 1
        expected = [study.comparisons[c].expected.get(metric) for c in trend.comparisons]
        sds = [given.sd for given in expected if given is not None and given.sd is not None]
        x = np.log10([sizes[against][place] for _, against in trend.members(study.comparisons)])
        spread = x - x.mean()
        if len(sds) < len(expected) or not spread.any():
            lines.append(f"trend {name}: unknown, not every comparison has an sd")
            continue
        weights = spread / (spread**2).sum()
        sd = math.sqrt(float(((weights * np.array(sds)) ** 2).sum()))
        smallest = detectable(sd, len(study.seeds), alpha=ALPHA / len(study.trends))
        lines.append(f"trend {name}: a slope of {smallest:.3g} per tenfold {trend.by} or more")
    return lines
