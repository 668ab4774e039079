"""An analysis as tables for a terminal: every number with half of its 95 % interval."""

from collections.abc import Sequence

from dsv3_mtp.analysis.analyse import Analysis
from dsv3_mtp.analysis.intervals import Estimate
from dsv3_mtp.report.progress import columns, quantity

TITLES = {
    "class": "by the class of the target ({})",
    "entropy": "by the entropy of the main head, nats",
    "position": "by the slot in the window",
}


def tables(found: Analysis) -> str:
    """All of it."""
    windows = f"{found.windows} windows of {found.window_tokens} tokens of {found.data}"
    parts = [f"{found.run}, {quantity(found.tokens)} tokens, on {windows}"]
    if found.against:
        parts.append(f"'minus': this run minus {found.against}, on the same windows")
    for name, groups in found.groups.items():
        keys = list(dict.fromkeys(key for row in groups.values() for key in row))
        rows = [[group, *(cell(row.get(key)) for key in keys)] for group, row in groups.items()]
        title = TITLES[name].format(found.classes_by)
        parts.append(table(title, ["", *map(heading, keys)], rows))
    if found.probes:
        keys = list(next(iter(found.probes.values())))
        rows = [[f"t+{k}", *(cell(row[key]) for key in keys)] for k, row in found.probes.items()]
        title = "linear probes of the trunk's last state, nats"
        parts.append(table(title, ["", *map(heading, keys)], rows))
    if found.routers:
        rows = [
            [str(one.depth), str(one.layer), cell(one.share), f"{one.independent:.3f}"]
            for one in found.routers
        ]
        header = ["depth", "trunk layer", "common experts", "if independent"]
        parts.append(table("experts of the heads, matched with those of the trunk", header, rows))
    if found.gradients:
        header = ["part of the run", "n", "cosine", "lowest", "highest", "below 0", "length"]
        rows = [
            [f"{row['from']:.0%} to {row['to']:.0%}", f"{row['n']:.0f}"]
            + [f"{row[key]:+.3f}" for key in ("cosine", "lowest", "highest")]
            + [f"{row['conflicts']:.0%}", f"{row['ratio']:.3f}"]
            for row in found.gradients
        ]
        title = "gradient of the heads against that of the main loss, on the trunk"
        parts.append(table(title, header, rows))
    notes = "\n".join(f"note: {note}" for note in found.notes)
    return "\n\n".join([*parts, *([notes] if notes else [])])


def heading(column: str) -> str:
    name, _, depth = column.partition("/")
    words = {
        "main_loss": "main loss",
        "main_loss_minus": "minus",
        "probe_minus": "minus",
        "table": f"table drafter {depth}" if depth else "table",
        "overlap": f"overlap {depth}",
    }
    return words.get(name, name)


def cell(value: Estimate | None) -> str:
    if value is None:
        return "-"
    return f"{value.mean:.3f}" + ("" if value.half is None else f" ±{value.half:.3f}")


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join([title, *(f"  {line}" for line in columns([header, *rows]))])
