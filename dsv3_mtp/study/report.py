"""The report of a study: report.md, report.html (no network) and PNG files, from its archive alone.

Honesty rules built in: the first screen holds the question, the answer, one picture and what is not
shown; what makes a study uninterpretable stands in the first line; the plan is printed with what
was changed after the first start; runs that diverged, failed or have not been run are listed; fewer
than three seeds conclude nothing; acceptance is never mixed with top1, agreement or overlap.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from dsv3_mtp.files.atomic import folder_for, write_text
from dsv3_mtp.report.progress import quantity
from dsv3_mtp.study import findings, hover, page, tables, trends, words
from dsv3_mtp.study.archive import RunRecord, Table, table_of, write_archive
from dsv3_mtp.study.calibration import calibration_table
from dsv3_mtp.study.findings import Findings
from dsv3_mtp.study.load import LoadedStudy
from dsv3_mtp.study.matrix import Study
from dsv3_mtp.study.measure import loss_error_metrics
from dsv3_mtp.study.metric_names import describe_metric
from dsv3_mtp.study.opening import opening
from dsv3_mtp.study.page import Code, Element, Heading, Items, Paragraph, Picture, Rows
from dsv3_mtp.study.pictures import draw_all
from dsv3_mtp.study.pictures.base import PictureData
from dsv3_mtp.study.plan import Plan, write_plan
from dsv3_mtp.study.power import detectables


def require_runs(study: Study, records: Iterable[RunRecord], folder: Path) -> Table:
    """The records by arm and seed. Raises ValueError where there is none to report on."""
    kept = table_of(study.arms, study.seeds, records)
    if not any(kept.values()):
        raise ValueError(
            f"{folder}: no run is finished and measured as this study asks, so that there is "
            "nothing to report"
        )
    return kept


def write_report(
    loaded: LoadedStudy, plan: Plan, records: Iterable[RunRecord], folder: Path
) -> Path:
    """Writes report and archive into `folder`; returns report.md. Raises ValueError: no run."""
    study = loaded.study
    kept = require_runs(study, records, folder)
    table = _with_loss_errors(loaded, kept)
    effects = findings.effects_of(study, table)
    found = Findings(loaded, plan, table, effects, list(detectables(study)))
    folder_for(folder)
    data = PictureData(study, loaded.configs, table, effects)
    pictures = [Picture(*item) for item in draw_all(data.legible, folder)]
    first = [picture for picture in pictures if picture.file == "answer.png"]
    blocks = [
        *opening(found, first),
        *setup(found),
        *tables.floor_tables(study, table),
        *calibration_table(loaded.configs, table),
        *tables.grid_tables(study, table),
        *tables.result_table(study, table),
        *tables.comparison_tables(study, table, effects),
        *trends.blocks(trends.slopes_of(study, table)),
        Heading("Pictures"),
        *few_arms(data),
        *(picture for picture in pictures if picture not in first),
        *health(found),
        *plan_blocks(found),
        *environment(found.records),
    ]
    write_archive(folder, (record for seeds in kept.values() for record in seeds.values()))
    write_plan(folder, plan)
    html = page.to_html(blocks, hover.live(data), title=study.run.name, folder=folder)
    write_text(folder / "report.html", html)
    write_text(folder / "report.md", page.to_markdown(blocks))
    return folder / "report.md"


def _with_loss_errors(loaded: LoadedStudy, table: Table) -> Table:
    """The records with what needs the runs of another arm."""
    found = {arm: dict(seeds) for arm, seeds in table.items()}
    for record, reference in findings.references(loaded.study, table):
        if record.finished:
            errors = loss_error_metrics(record.curves, reference.curves, total_tokens=record.tokens)
            metrics = {"metrics": record.metrics | errors}
            found[record.arm][record.seed] = record.model_copy(update=metrics)
    return found


def setup(found: Findings) -> list[Element]:
    study = found.loaded.study
    scale, rows = study.scales[study.scale], []
    for arm, spec in study.arms.items():
        records = list(found.table[arm].values())
        if records:
            one = records[0]
            paces = [r.seconds_per_token for r in records if r.seconds_per_token is not None]
            fork = "-"
            if one.forked_from:
                fork = f"{one.forked_from.run.rpartition('-')[0]} at step {one.forked_from.step}"
            counts = [quantity(one.parameters[kind]) for kind in ("training", "inference")]
            cost = tables.cost_cells(one.tokens, one.flops, fmean(paces) if paces else None)
            settings = ", ".join(settings_lines(spec.set)) or "-"
            rows.append([arm, *counts, *cost, fork, spec.about, settings])
    header = ["arm", "parameters, training", "inference", "tokens", "training FLOPs", "seconds"]
    finished = sum(record.finished for record in found.records)
    # Where the runs stood is no setting.
    sets = [item for item in found.plan.sets if not item.startswith("run.")]
    return [
        Heading("Setup"),
        Paragraph(
            f"{finished} runs finished of {len(study.arms)} arms x {len(study.seeds)} seeds. "
            f"Primary metric: {describe_metric(study.primary.metric)[0]}, in the comparison "
            f'"{study.primary.comparison}"; everything else is exploratory.'
        ),
        Rows([*header, "forked from", "what", "settings"], rows),
        Paragraph(
            "Inference parameters leave out the heads, which a plain decoder drops. FLOPs are "
            "counted (6 per active weight and token, attention, every depth). Seconds are of one "
            "process computing a whole run, validations included. A forked run shares the first "
            "steps with its parent, bit for bit."
        ),
        Code(
            f"base: {scale.base}, scale: {study.scale}, seeds: {list(study.seeds)}, "
            f"--set: {sets}\n" + "\n".join(settings_lines({**scale.set, **study.set}))
        ),
        Paragraph(drafts_line(found.loaded)),
    ]


def settings_lines(overrides: Mapping[str, Any]) -> list[str]:
    """Whole, so that the study can be repeated from its report."""
    return [f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in overrides.items()]


def drafts_line(loaded: LoadedStudy) -> str:
    drafts = loaded.study.acceptance
    answers = [c.data.task is not None and c.data.task.has_answers for c in loaded.configs.values()]
    if drafts is None:
        return "Free-running drafts: not measured."
    if all(answers):
        behind = f"the last answer of each of {drafts.prefixes} validation examples"
    else:
        behind = (
            f"{drafts.new_tokens} new tokens behind each of {drafts.prefixes} prefixes of "
            f"{drafts.prefix_tokens} tokens of the validation data, the same for every run"
        )
    return (
        f"Free-running drafts: {behind}, in {drafts.draws} sets with random numbers of their "
        "own in every run."
    )


def few_arms(data: PictureData) -> list[Element]:
    """A line where the pictures leave arms out."""
    shown, arms = len(data.legible.study.arms), len(data.study.arms)
    whose = "those of the primary comparison; report.html has all"
    return [Paragraph(f"Of {arms} arms {shown} are drawn, {whose}.")] if shown < arms else []


def health(found: Findings) -> list[Element]:
    """What did not go well, and the leak alarm."""
    study, table = found.loaded.study, found.table
    missing = findings.lost(table, list(study.arms)) + findings.not_run(study, table)
    blocks: list[Element] = [Heading("Runs that do not count, and leaks")]
    good = Paragraph("Every run of the matrix finished; none diverged.")
    blocks.append(Items(missing) if missing else good)
    leaks = findings.leaks(table)
    if not leaks:
        none = "Leak alarm (a depth's loss below 0.8 of the main loss): none."
        return [*blocks, Paragraph(none)]
    text = (
        "Leak alarm: the loss of a depth lies below 0.8 of the main loss. On text that means a "
        "leaked target; in a task whose later answer tokens are easier than the first it is what "
        "the task asks for."
    )
    more = [f"... {len(leaks)} in all"] * (len(leaks) > 20)
    return [*blocks, Paragraph(text), Items(leaks[:20] + more)]


def plan_blocks(found: Findings) -> list[Element]:
    study, plan, table = found.loaded.study, found.plan, found.table
    lines = []
    for effect in (e for e in found.effects if e.primary):
        lost = findings.lost(table, [effect.arm, effect.against])
        lines.append(words.verdict(effect, margin=study.primary.margin, lost_runs=lost))
    blocks: list[Element] = [
        Heading("The plan, and what came of it"),
        Paragraph(
            f"Frozen at the first start, {plan.frozen_at}, with hash {plan.hash[:16]}. Expected "
            f"then: {plan.frozen['study']['expectation'].strip()}"
        ),
        Items(lines),
    ]
    if plan.changes:
        if late := ", ".join(map(str, plan.late_seeds())):
            blocks.append(Paragraph(f"Seeds added after the first start: {late}."))
        rows = [
            [c.key, json.dumps(c.before), json.dumps(c.now), str(c.finished), c.time]
            for c in plan.changes
        ]
        blocks.append(Paragraph("The study was changed after its first start:"))
        blocks.append(Rows(["key", "before", "now", "finished runs then", "time"], rows))
    else:
        blocks.append(Paragraph("Nothing was changed since."))
    if any(d.smallest is not None or d.expected is not None for d in found.power):
        header, *rows = tables.power_rows(found.power)
        sources = "; ".join(dict.fromkeys(d.source for d in found.power if d.source))
        note = (
            "What these seeds could find with probability 0.8, at Holm's first step, by the "
            f"standard deviation expected: {sources or 'solve rates need none'}."
        )
        blocks += [Paragraph(note), Rows(header, rows)]
    return blocks


def environment(records: Sequence[RunRecord]) -> list[Element]:
    """Commit, data, versions, hardware: every value that occurs, so that a mixture shows."""
    starts = [start for record in records for start in record.starts]

    def all_of(values: Iterable[Any]) -> str:
        return ", ".join(sorted({str(value) for value in values}))

    corpora = {f"{role} {d.path} {d.hash[:12]}" for s in starts for role, d in s.data.items()}
    packages = [
        f"{name} {all_of(s.versions.get(name) for s in starts)}" for name in ("torch", "deepspeed")
    ]
    adopted = [f"{r.name} from {r.adopted_from}" for r in records if r.adopted_from]
    lines = [
        f"commit {all_of(s.commit for s in starts)}; uncommitted changes: "
        f"{'yes' if any(s.dirty for s in starts) else 'none'}",
        f"data, whose hash another corpus does not have: {all_of(corpora)}",
        f"{', '.join(packages)}, python {all_of(s.python for s in starts)}",
        f"{all_of(s.device for s in starts)}, threads per run: {all_of(s.threads for s in starts)}",
    ]
    if adopted:
        lines.append(f"adopted runs: {', '.join(adopted)}")
    return [Heading("Where it was made"), Items(lines)]
