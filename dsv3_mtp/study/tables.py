"""The tables of a report: floors, results, comparisons, and the pair of main loss and overlap."""

from collections.abc import Sequence
from statistics import fmean

from dsv3_mtp.report.metrics import depths_of
from dsv3_mtp.report.progress import quantity
from dsv3_mtp.study import findings, stats, words
from dsv3_mtp.study.archive import Table
from dsv3_mtp.study.findings import LOSS, Effect, draw_sd, paired, values_of
from dsv3_mtp.study.load import axis_names
from dsv3_mtp.study.matrix import Study
from dsv3_mtp.study.measure import ABOVE, OVERLAP
from dsv3_mtp.study.metric_names import describe_metric, is_rate_over_seeds
from dsv3_mtp.study.page import Element, Heading, Paragraph, Rows
from dsv3_mtp.study.power import Detectable

FLOORS = ("unigram", "bigram", "trigram")


def floor_tables(study: Study, table: Table) -> list[Element]:
    """Main loss beside n-gram tables, overlap beside drafters without a network."""
    blocks: list[Element] = []
    names = [f"val/floor/{name}" for name in FLOORS]
    rows = []
    for arm in study.arms:
        cells = [_mean(table, arm, name, ".3f") for name in (LOSS, *names)]
        if any(cell != "-" for cell in cells[1:]):
            rows.append([arm, *cells])
    if rows:
        note = (
            "Nats per token on the same validation windows; the tables are counted from exactly "
            "the tokens that the run has consumed."
        )
        blocks += [Rows(["arm", "main loss", *FLOORS], rows), Paragraph(note)]
    rows = []
    for arm in study.arms:
        for k in _depths(table, arm, OVERLAP):
            floor = f"val/floor/overlap/{{}}/{k}"
            names = [f"{OVERLAP}/{k}", *(floor.format(kind) for kind in ("constant", "table"))]
            rows.append([arm, str(k), *(_mean(table, arm, name, ".3f") for name in names)])
    if rows:
        header = ["arm", "depth", "overlap", "of a constant drafter", "of a table drafter"]
        note = (
            "Overlap: the probability that a sampled draft is accepted, given that the tokens "
            "before it are the real text. The drafters without a network face the same main model."
        )
        blocks += [Rows(header, rows), Paragraph(note)]
    return [Heading("Floors"), *blocks] if blocks else []


def _depths(table: Table, arm: str, metric: str) -> list[int]:
    """Depths for which the first finished run of an arm has `metric`/k."""
    finished = (record.metrics for record in table.get(arm, {}).values() if record.finished)
    return depths_of(next(finished, {}), metric)


def _mean(table: Table, arm: str, metric: str, spec: str) -> str:
    values = values_of(table, arm, metric).values()
    return format(fmean(values), spec) if values else "-"


def grid_tables(study: Study, table: Table) -> list[Element]:
    """Of a grid of two axes: the primary metric, and tokens per step, by the values of both."""
    if study.grid is None or len(study.grid.axes) != 2:
        return []
    (down, first), (across, second) = (
        (label, axis_names(label, axis.values)) for label, axis in study.grid.axes.items()
    )
    found: list[Element] = []
    for metric in dict.fromkeys([study.primary.metric, "acceptance/T1/tokens_per_step"]):
        cells = [[_grid_cell(table, f"{a}_{b}", metric) for b in second] for a in first]
        if any(cell != "-" for row in cells for cell in row):
            floor = metric.replace("val/overlap/", "val/floor/overlap/table/")
            floors = [_grid_cell(table, f"{a}_{second[0]}", floor) for a in first]
            beside = floor != metric and floors != ["-"] * len(first)
            rows = [
                [a, *row, *([own.partition(" ")[0]] if beside else [])]
                for a, row, own in zip(first, cells, floors, strict=True)
            ]
            header = [f"{down} \\ {across}", *second, *(["table drafter"] if beside else [])]
            found += [Paragraph(f"{describe_metric(metric)[0]}:"), Rows(header, rows)]
    if not found:
        return []
    note = "Mean over seeds and half of its 95 % t interval."
    return [Heading(f"Every {down} with every {across}"), *found, Paragraph(note)]


def _grid_cell(table: Table, arm: str, metric: str) -> str:
    values = list(values_of(table, arm, metric).values()) if arm in table else []
    if len(values) < 2:
        return f"{values[0]:.3f}" if values else "-"
    interval = stats.t_interval(values)
    return f"{interval.mean:.3f} +- {interval.high - interval.mean:.3f}"


def result_table(study: Study, table: Table) -> list[Element]:
    # text that repeats itself is easily predicted
    beside = ("T0/tokens_per_step", "T1/tokens_per_step", "T1/plain_over_drafting", "T0/distinct")
    asked = [study.primary.metric, *study.metrics, *(f"acceptance/{name}" for name in beside)]
    metrics = list(dict.fromkeys(asked))
    measured = [m for m in metrics if any(values_of(table, arm, m) for arm in study.arms)]
    rows = [[arm, *(interval_cell(table, arm, m) for m in measured)] for arm in study.arms]
    note = "Mean over seeds, half of its 95 % t interval, and (number of seeds)"
    if any(record.draw_sd for seeds in table.values() for record in seeds.values()):
        note += (
            "; in square brackets the standard deviation of one run over draws and, behind the "
            "stroke, over seeds"
        )
    if study.solve_threshold is not None:
        note += "; solve rates with Clopper and Pearson's exact interval"
    return [
        Heading("Results"),
        Rows(["arm", *(describe_metric(m)[0] for m in measured)], rows),
        Paragraph(f"{note}."),
    ]


def interval_cell(table: Table, arm: str, metric: str) -> str:
    values = list(values_of(table, arm, metric).values())
    if not values:
        return "-"
    if is_rate_over_seeds(metric):
        low, high = stats.exact_rate(int(sum(values)), len(values))
        return f"{int(sum(values))} of {len(values)} [{low:.2f}, {high:.2f}]"
    i = stats.t_interval(values)
    if i.n < 2:
        return f"{i.mean:.4f} (1)"
    drawn = draw_sd(table, arm, metric)
    spread = f" [{drawn:.3f} / {i.sd:.3f}]" if drawn is not None else ""
    return f"{i.mean:.4f} +- {i.high - i.mean:.4f} ({i.n}){spread}"


def comparison_tables(study: Study, table: Table, effects: Sequence[Effect]) -> list[Element]:
    found: list[Element] = [Heading("Comparisons")]
    for name, comparison in study.comparisons.items():
        group = [e for e in effects if e.comparison == name and e.interval is not None]
        if group:
            found += [
                Heading(f"{name}: against {comparison.against}", 3),
                Paragraph(f"Fairness: {comparison.rule}. Paired by seed."),
                Rows(EFFECT_HEADER, [effect_row(e) for e in group]),
                *pair_table(table, name, group),
            ]
    times = findings.solve_times(study, table)
    if times:
        rows = [
            [t.arm, t.against, *(f"{count} of {t.n}" for count in (t.first, t.later))]
            + [f"{p:.3g}" for p in (t.p, t.adjusted_p)]
            for t in times
        ]
        header = ["arm", "against", "solves first", "solves later", "p (log-rank)", "p (Holm)"]
        note = "Log-rank test, stratified by seed; a run that does not solve its task is censored."
        found += [Heading("Time to solve", 3), Rows(header, rows), Paragraph(note)]
    readings = "Holm's correction is within the primary comparison, and within all others together."
    if any(e.speed_up for e in effects):
        readings += (
            " Speed-up: tokens of the other arm over tokens of this one, both to the same main "
            "loss, read off the validation curves (geometric mean over seeds); the side that "
            "ends lower passes that loss at a rate that has not decayed yet, so the true factor is "
            "further from 1."
        )
    return [*found, Paragraph(readings)]


EFFECT_HEADER = (
    *("arm", "metric", "difference", "95 % interval", "n", "p (Holm)", "reading"),
    *("sd paired / unpaired", "TOST p", "speed-up"),
)


def effect_row(effect: Effect) -> list[str]:
    i = effect.interval
    assert i is not None
    name = f"{effect.arm} (primary)" if effect.primary else effect.arm
    tost = "-" if effect.equivalence_p is None else f"{effect.equivalence_p:.2g}"
    limits, spread = f"[{i.low:+.4f}, {i.high:+.4f}]", f"{i.sd:.4f} / {effect.unpaired_sd:.4f}"
    p = f"{effect.adjusted_p:.2g}"
    if i.n < 2:
        limits, spread, tost, p = "-", "-", "-", "-"
    if is_rate_over_seeds(effect.metric):
        limits, spread, tost = f"McNemar p = {effect.p:.3g}", "-", "-"
    speed = "-" if effect.speed_up is None else f"{effect.speed_up:.2f}x"
    cells = [f"{i.mean:+.4f}", limits, str(i.n), p, reading(effect), spread, tost, speed]
    return [name, effect.metric, *cells]


def reading(effect: Effect) -> str:
    """One effect in a few words."""
    if effect.few:
        return "too few seeds"
    i, better = effect.interval, describe_metric(effect.metric)[1]
    assert i is not None
    if effect.shown:
        direction = "higher" if i.mean > 0 else "lower"
        good = {None: "", direction: ", better"}.get(better, ", worse")
        text = f"{direction}{good}{', but within the margin' if effect.equal else ''}"
    elif effect.stands_out:
        text = "hint only"
    elif effect.identical:
        text = "identical"
    else:
        text = "equal within the margin" if effect.equal else "not detectable"
    return text + words.expectation(effect)


def pair_table(table: Table, comparison: str, group: Sequence[Effect]) -> list[Element]:
    """Of arms whose trunks were trained apart: overlap beside the loss of the trunk."""
    rows = []
    for arm, against in dict.fromkeys((e.arm, e.against) for e in group):
        if not findings.trunks_apart(table, arm, against):
            continue
        theirs = _depths(table, against, ABOVE)
        for k in (depth for depth in _depths(table, arm, ABOVE) if depth in theirs):
            metrics = (LOSS, f"{ABOVE}/{k}", f"{OVERLAP}/{k}")
            rows.append([arm, str(k), *(_difference(table, arm, against, m) for m in metrics)])
    if not rows:
        return []
    note = (
        "These trunks were trained apart, and overlap falls as a trunk learns: read main loss and "
        "the overlap above the table drafter as a pair, not overlap alone. Differences with 95 % "
        "intervals, exploratory."
    )
    header = ["arm", "depth", "main loss", "overlap above the table drafter", "overlap"]
    return [Paragraph(note), Rows(header, rows)]


def _difference(table: Table, arm: str, against: str, metric: str) -> str:
    differences = list(paired(table, arm, against, metric).values())
    return stats.t_interval(differences).signed if differences else "-"


def power_rows(found: Sequence[Detectable]) -> list[list[str]]:
    """What each comparison can find, beside what it expects."""
    rows = [["comparison", "arm", "metric", "sd expected", "detectable", "expected", "in advance"]]
    for item in found:
        if item.smallest is None and item.expected is None and not item.primary:
            continue  # nothing is known of it beforehand
        smallest = "-" if item.smallest is None else f"{item.smallest:.3g}"
        expected = "-" if item.expected is None else f"{item.expected:+.3g}"
        word = "unresolved" if item.unresolved else "resolvable" if item.expected else "-"
        sd = "-" if item.sd is None else f"{item.sd:.3g}"
        metric = item.metric + (" (primary)" if item.primary else "")
        known = word if item.smallest is not None else "unknown: no sd given"
        rows.append([item.comparison, item.arm, metric, sd, smallest, expected, known])
    return rows


def cost_cells(tokens: int, flops: float, seconds: float | None) -> list[str]:
    return [quantity(tokens), f"{flops:.3g}", "-" if seconds is None else f"{seconds * tokens:.0f}"]
