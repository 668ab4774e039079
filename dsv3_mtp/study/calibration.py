"""Measured against theory, for runs on a Markov source: what calibrate.yaml is for."""

from collections.abc import Mapping

from dsv3_mtp.config import Config
from dsv3_mtp.study.archive import Table
from dsv3_mtp.study.findings import values_of
from dsv3_mtp.study.page import Element, Heading, Paragraph, Rows


def calibration_table(configs: Mapping[str, Config], table: Table) -> list[Element]:
    """Losses above the true source's on the same tokens; acceptance beside the best possible."""
    known = {arm: c for arm, c in configs.items() if c.data.task and c.data.task.reference(c.mtp)}
    if not known:
        return []
    width = max(1 + config.mtp.depths for config in known.values())
    rows = []
    for arm, config in known.items():
        metrics = [f"task/excess_loss/{k}" for k in range(1 + config.mtp.depths)]
        excess = [list(values_of(table, arm, metric).values()) for metric in metrics]
        cells = [format(sum(v) / len(v), "+.4f") if v else "-" for v in excess]
        rows.append([arm, *cells, *["-"] * (width - len(cells)), acceptances(table, arm, config)])
    columns = [f"excess loss, depth {k}" for k in range(width)]
    header = ["arm", *columns, "acceptance at T = 1 (best possible)"]
    note = (
        "Loss above that of the true source on the same tokens, in nats: 0 is perfect. A "
        "sequential module sees the token before its target and can reach the entropy rate; a head "
        "that does not is left with the entropy of k + 1 steps and is measured against that. The "
        "best acceptance is that of the first step behind a real prefix; later steps start behind "
        "the model's own text, so that the measured one may lie a little above it."
    )
    worst = Paragraph(worst_excess(table))
    return [Heading("Against the known source"), worst, Rows(header, rows), Paragraph(note)]


def acceptances(table: Table, arm: str, config: Config) -> str:
    """Mean measured acceptance of drafts 1..k, and in brackets the best possible."""
    assert config.data.task is not None
    best, cells = config.data.task.reference(config.mtp), []
    for k in range(1, 1 + config.mtp.depths):
        name = f"acceptance/T1/joint/{k}"
        values = list(values_of(table, arm, name).values())
        measured = f"{sum(values) / len(values):.3f}" if values else "-"
        known = f"{best[name]:.3f}" if name in best else "not known"
        cells.append(f"{measured} ({known})")
    return ", ".join(cells) or "-"


def worst_excess(table: Table) -> str:
    """The largest distance of any run's loss, at any depth, from what is known."""
    found = [
        (abs(value), f"{metric.removeprefix('task/')} of {record.name}")
        for seeds in table.values()
        for record in seeds.values()
        for metric, value in record.metrics.items()
        if metric.startswith("task/excess_loss/")
    ]
    if not found:
        return "No loss was measured against the source."
    value, where = max(found)
    return f"Every loss lies within {value:.3f} nats of the known one (furthest: {where})."
