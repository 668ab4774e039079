"""The report of a study: report.md, report.html (no network), PNG files and summary.json in the
study's folder.

Honesty rules built in: the question and expectation come from the file, written before the runs;
one primary metric; runs that diverged, failed or have not been run are listed; one seed concludes
nothing; acceptance is free-running and never mixed with top1 or agreement; the scale is stated.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dsv3_mtp.files.atomic import write_json, write_text
from dsv3_mtp.report.metrics import read_metrics
from dsv3_mtp.report.progress import quantity
from dsv3_mtp.study import findings, stats
from dsv3_mtp.study.calibration import calibration_table, worst_excess
from dsv3_mtp.study.expand import expand
from dsv3_mtp.study.findings import Effect, Table, is_primary, values_of, verdict
from dsv3_mtp.study.matrix import LoadedStudy, Study
from dsv3_mtp.study.measure import loss_error_metrics, read_results
from dsv3_mtp.study.metric_names import describe_metric
from dsv3_mtp.study.page import (
    Block,
    Code,
    Heading,
    Items,
    Paragraph,
    Picture,
    Rows,
    to_html,
    to_markdown,
)
from dsv3_mtp.study.pictures import Data, draw_all
from dsv3_mtp.study.run import check_folders, read_budgets, settings_of

CALIBRATION = "calibrate"  # name of the study whose outcome every report starts with
SMALL = 10_000_000  # parameters below which a report says that its scale is small


def write_report(loaded: LoadedStudy) -> Path:
    """Writes the report on whatever has been run; returns the path of report.md.

    Raises:
        ValueError: nothing has been run, runs have other settings than the study's, or a
            results.json is damaged.
    """
    study, folder = loaded.study, loaded.study.folder
    runs = {run.name: run for run in expand(loaded, read_budgets(folder))}
    check_folders(study, list(runs.values()))
    table: dict[str, dict[int, Any]] = {arm: {} for arm in study.arms}
    curves: dict[str, dict[int, Any]] = {arm: {} for arm in study.arms}
    starts = []
    for run in runs.values():
        results = read_results(folder / run.name)
        # or it was measured in another way
        if results is not None and results["settings"] == settings_of(study):
            table[run.arm][run.seed] = results
            curves[run.arm][run.seed] = read_metrics(folder / run.name / "metrics.jsonl")
            starts.append(
                json.loads((folder / run.name / "manifest.json").read_text())["starts"][-1]
            )
    if not starts:
        raise ValueError(
            f"{folder}: no run is finished and measured as this "
            "study asks, so that there is nothing to report"
        )
    for arm, seed, reference in findings.references(study, curves):
        if table[arm][seed]["status"] == "finished":
            table[arm][seed]["metrics"] |= loss_error_metrics(curves[arm][seed], reference)
    effects = findings.effects_of(study, table)
    pictures = draw_all(Data(study, loaded.configs, table, curves, effects))
    lines = verdicts(study, table, effects)
    blocks = [
        *opening(study, table, lines),
        *calibration_table(loaded.configs, table),
        *result_tables(study, table, effects),
        *(Picture(name, caption) for name, caption in pictures),
        *health(study, table),
        *setup(loaded, table, starts),
    ]
    write_text(folder / "report.md", to_markdown(blocks))
    write_text(folder / "report.html", to_html(blocks, title=study.run.name, folder=folder))
    write_json(folder / "summary.json", summary(study, table, effects, lines))
    return folder / "report.md"


def opening(study: Study, table: Table, lines: Sequence[str]) -> list[Block]:
    finished = sum(r["status"] == "finished" for seeds in table.values() for r in seeds.values())
    return [
        Heading(study.run.name, 1),
        Paragraph(calibration_line(study)),
        Heading("Question"),
        Paragraph(study.question.strip()),
        Paragraph(f"Expected, written before the runs: {study.expectation.strip()}"),
        Heading("Outcome"),
        Paragraph(
            f"{finished} runs finished of {len(study.arms)} arms "
            f"x {len(study.seeds)} seeds. Primary metric, declared "
            f"before the runs: {describe_metric(study.primary.metric)[0]}, in the comparison "
            f'"{study.primary.comparison}". Everything else is exploratory.'
        ),
        Items(lines),
        Paragraph(scale_line(table)),
    ]


def calibration_line(study: Study) -> str:
    """What the study with known answers has shown of this code on this machine."""
    if study.run.name == CALIBRATION:
        return "Calibration: this study measures against known answers; the other reports quote it."
    path = Path(study.run.dir) / CALIBRATION / "summary.json"
    if not path.exists():
        return (
            f"Calibration: configs/studies/{CALIBRATION}.yaml has not been run beside this study."
        )
    found = json.loads(path.read_text())
    return f"Calibration against a source with known entropy: {found['calibration']}"


def scale_line(table: Table) -> str:
    sizes = [r["parameters"]["training"] for seeds in table.values() for r in seeds.values()]
    tokens = max(r["tokens"] for seeds in table.values() for r in seeds.values())
    size = f"Scale: up to {quantity(max(sizes))} parameters and {quantity(tokens)} tokens."
    if max(sizes) >= SMALL:
        return size
    return (
        f"{size} This is far below the scale of the papers; "
        "signs and sizes of effects can be others there."
    )


def verdicts(study: Study, table: Table, effects: Sequence[Effect]) -> list[str]:
    """The primary effects one by one, then the exploratory ones that are more than a hint, then how
    many are not.
    """
    primary = [e for e in effects if is_primary(study, e)]
    rest = [e for e in effects if not is_primary(study, e) and e.interval is not None]
    lines = []
    for effect in primary:
        lost = findings.lost(table, [effect.arm, effect.against])
        lines.append("Primary: " + verdict(effect, margin=study.primary.margin, lost_runs=lost))
    clear = [e for e in rest if findings.stands_out(e)]
    for effect in clear:
        lost = findings.lost(table, [effect.arm, effect.against])
        lines.append(
            f"Exploratory ({effect.comparison}): " + verdict(effect, margin=None, lost_runs=lost)
        )
    single = [e for e in rest if e.interval is not None and e.interval.n < 2]
    nulls = [e for e in rest if e not in clear and e not in single]
    for found, group in (
        ("No detectable difference", nulls),
        ("One seed, so no conclusion,", single),
    ):
        if group:
            names = "; ".join(f"{e.arm} - {e.against}, {e.metric}" for e in group)
            lines.append(
                f"{found} in {len(group)} of {len(rest)} exploratory comparisons: {names}."
            )
    return lines


def result_tables(study: Study, table: Table, effects: Sequence[Effect]) -> list[Block]:
    # Beside acceptance, whether the text repeats itself: then it is easily predicted.
    metrics = list(dict.fromkeys([study.primary.metric, *study.metrics, "acceptance/T0/distinct"]))
    measured = [m for m in metrics if any(values_of(table, arm, m) for arm in study.arms)]
    rows = [[arm, *(interval_cell(table, arm, m) for m in measured)] for arm in study.arms]
    found: list[Block] = [
        Heading("Results"),
        Paragraph(
            "Mean over seeds and its 95 % t interval; solve "
            "rates with Clopper and Pearson's exact interval."
        ),
        Rows(["arm", *(f"{describe_metric(m)[0]} (n)" for m in measured)], rows),
    ]
    for name, comparison in study.comparisons.items():
        group = [e for e in effects if e.comparison == name and e.interval is not None]
        if group:
            found += [
                Heading(f"{name}: against {comparison.against}", 3),
                Paragraph(
                    f"Fairness: {comparison.rule}. Paired by seed; p is Holm's, within its family."
                ),
                Rows(EFFECT_HEADER, [effect_row(study, e) for e in group]),
            ]
    return found


EFFECT_HEADER = [
    "arm",
    "metric",
    "difference",
    "95 % interval",
    "n",
    "p (Holm)",
    "sd paired / unpaired",
    "TOST p",
]


def effect_row(study: Study, effect: Effect) -> list[str]:
    i = effect.interval
    assert i is not None
    mark = " (primary)" if is_primary(study, effect) else ""
    tost = (
        "-"
        if effect.equivalence_p is None
        else f"{effect.equivalence_p:.2g} (+-{study.primary.margin:g})"
    )
    spread = f"{i.sd:.4f} / {effect.unpaired_sd:.4f}"
    limits = f"[{i.low:+.4f}, {i.high:+.4f}]"
    if i.n < 2:
        limits, spread, tost = "one seed: none", "-", "-"
    if effect.metric == "task/solved":
        limits, spread, tost = f"Fisher p = {effect.p:.3g}", "-", "-"
    p = f"{effect.adjusted_p:.2g}" if i.n > 1 else "-"
    return [effect.arm + mark, effect.metric, f"{i.mean:+.4f}", limits, str(i.n), p, spread, tost]


def interval_cell(table: Table, arm: str, metric: str) -> str:
    values = list(values_of(table, arm, metric).values())
    if not values:
        return "-"
    if metric == "task/solved":
        low, high = stats.exact_rate(int(sum(values)), len(values))
        return f"{int(sum(values))} of {len(values)} [{low:.2f}, {high:.2f}]"
    i = stats.t_interval(values)
    return f"{i.mean:.4f} +- {i.high - i.mean:.4f} ({i.n})" if i.n > 1 else f"{i.mean:.4f} (1)"


def health(study: Study, table: Table) -> list[Block]:
    """What did not go well, and the leak alarm."""
    missing = findings.lost(table, list(study.arms)) + findings.not_run(study, table)
    blocks: list[Block] = [Heading("Runs that do not count, and alarms")]
    blocks.append(
        Items(missing) if missing else Paragraph("Every run of the matrix finished; none diverged.")
    )
    alarms = findings.leaks(table)
    if not alarms:
        return [*blocks, Paragraph("Leak alarm (a depth's loss below 0.8 of the main loss): none.")]
    reading = (
        "Leak alarm: the loss of a depth lies below 0.8 of "
        "the main loss. On text that means a leaked target; in "
        "a task whose later answer tokens are easier than the first it is what the task asks for."
    )
    return [
        *blocks,
        Paragraph(reading),
        Items(alarms[:20] + [f"... {len(alarms)} in all"] * (len(alarms) > 20)),
    ]


def setup(loaded: LoadedStudy, table: Table, starts: Sequence[Mapping[str, Any]]) -> list[Block]:
    study, scale = loaded.study, loaded.study.scales[loaded.study.scale]
    rows = []
    for arm, spec in study.arms.items():
        results = list(table[arm].values())
        if results:
            one, paces = (
                results[0],
                [r["seconds_per_token"] for r in results if "seconds_per_token" in r],
            )
            seconds = f"{sum(paces) / len(paces) * one['tokens']:.0f}" if paces else "-"
            origin = one["forked_from"]
            fork = f"{origin['run'].rpartition('-')[0]} at step {origin['step']}" if origin else "-"
            counts = [quantity(one["parameters"][kind]) for kind in ("training", "inference")]
            cost = [quantity(one["tokens"]), f"{one['flops']:.3g}", seconds]
            settings = ", ".join(settings_lines(spec.set)) or "-"
            rows.append([arm, *counts, *cost, fork, spec.about, settings])
    header = ["arm", "parameters, training", "inference", "tokens", "training FLOPs", "seconds", "forked from", "what",
              "settings"]  # fmt: skip
    common = {**scale.set, **study.set}
    return [
        Heading("Setup"),
        Rows(header, rows),
        Paragraph(
            "Inference parameters leave out the heads, which a "
            "plain decoder drops. FLOPs are counted (6 per active "
            "weight and token, attention, every depth). Seconds "
            "are of one process computing a whole run, validations "
            "included. A forked run shares the first steps with its parent, bit for bit."
        ),
        Code(
            f"base: {scale.base}, scale: {study.scale}, seeds: "
            f"{list(study.seeds)}, --set: {list(loaded.sets)}"
        ),
        Code("\n".join(settings_lines(common))),
        Paragraph(drafts_line(loaded)),
        Items(environment(starts)),
    ]


def settings_lines(overrides: Mapping[str, Any]) -> list[str]:
    """Whole, so that the study can be repeated from its report."""
    return [f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in overrides.items()]


def drafts_line(loaded: LoadedStudy) -> str:
    drafts, tasks = (
        loaded.study.acceptance,
        [config.data.task for config in loaded.configs.values()],
    )
    if drafts is None:
        return "Drafts: not measured."
    if all(task is not None and task.has_answers for task in tasks):
        return (
            "Drafts: free-running, the last answer of "
            f"each of {drafts.prefixes} validation examples."
        )
    return (
        f"Drafts: free-running, {drafts.new_tokens} new "
        f"tokens behind each of {drafts.prefixes} prefixes of "
        f"{drafts.prefix_tokens} tokens of the validation data, the same for every run."
    )


def environment(starts: Sequence[Mapping[str, Any]]) -> list[str]:
    """Commit, data, versions, hardware: every value that occurs, so that a mixture shows."""

    def all_of(values: Sequence[Any]) -> str:
        return ", ".join(sorted({str(value) for value in values}))

    data = {
        f"{role} {d['path']} {d['manifest_hash'][:12]}"
        for s in starts
        for role, d in s["data"].items()
    }
    return [
        (
            f"commit {all_of([s['git'] for s in starts])}; uncommitted "
            f"changes: {all_of([s['git_dirty'] for s in starts])}"
        ),
        f"data: {all_of(list(data))}",
        f"torch {all_of([s['versions']['torch'] for s in starts])}, deepspeed "
        f"{all_of([s['versions']['deepspeed'] for s in starts])}, "
        f"python {all_of([s['python'] for s in starts])}",
        (
            f"{all_of([s['device'] for s in starts])}, threads "
            f"per run: {all_of([s['threads'] for s in starts])}"
        ),
    ]


def summary(
    study: Study, table: Table, effects: Sequence[Effect], lines: Sequence[str]
) -> dict[str, Any]:
    """For other programs, and for the reports that quote the calibration."""
    rows = [
        {
            **{k: v for k, v in vars(e).items() if k != "interval"},
            **(vars(e.interval) if e.interval else {}),
        }
        for e in effects
    ]
    for row in rows:
        row |= {k: None for k, v in row.items() if isinstance(v, float) and not math.isfinite(v)}
    return {
        "study": study.run.name,
        "calibration": worst_excess(table),
        "verdicts": list(lines),
        "effects": rows,
    }
