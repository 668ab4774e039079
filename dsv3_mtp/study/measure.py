"""What is measured once a run is trained: the record of archive.py, from a run folder.

Metric names: `val/...` and `task/...` of the last validation, `acceptance/T0/...` (greedy) and
`acceptance/T1/...` of free-running drafts, `train/max_violation` over the last quarter of training.
The report adds `train/main_loss_error` and its like, which need the runs of another arm.
"""

import hashlib
import itertools
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch

from dsv3_mtp.analysis.renamed import renamed_windows, second_tokens
from dsv3_mtp.config import code
from dsv3_mtp.data.opening import validation_source
from dsv3_mtp.data.source import open_source, splits_of
from dsv3_mtp.data.tokenizer import recorded_encoder
from dsv3_mtp.decode.draft import no_drafter
from dsv3_mtp.files.run_folder import tokenizer_of
from dsv3_mtp.model.causal_lm import DeepseekV3MTP
from dsv3_mtp.report.metrics import Record as Logged
from dsv3_mtp.report.metrics import depths_of, read_metrics
from dsv3_mtp.runs.folder import read_starts
from dsv3_mtp.runs.model import load_model
from dsv3_mtp.study.archive import Curve, Data, Fork, RunRecord, Start
from dsv3_mtp.study.expand import Run, consumed, size_of, training_flops
from dsv3_mtp.study.matrix import AcceptanceSection, Study
from dsv3_mtp.train.floors import drafter_floors
from dsv3_mtp.train.validation import acceptance, validate

SOLVED = "task/exact_match"
SHIFT = "shift"  # a split of sitelib
RENAMED = 256  # windows with names that the model has never seen
LOSSES = ("train/main_loss", "train/mtp_loss/")
SMOOTH = ("moe/max_violation", "moe/mtp_max_violation/1")  # drawn smoothed: kept as means of parts
PARTS = 100  # of a smoothed curve
TABLE, OVERLAP, ABOVE = "val/floor/overlap/table", "val/overlap", "val/overlap_above_table"


def measured_settings(study: Study) -> dict[str, Any]:
    """What a record depends on beside the run's config."""
    asked = study.model_dump(mode="json", include={"acceptance", "solve_threshold"})
    return asked | {"every_loss": bool(study.loss_error_against)}


def measure(
    study: Study, run: Run, folder: Path, *, from_log: bool = False, **more: Any
) -> RunRecord:
    """The record of a trained run.

    Args:
        folder: of the run.
        from_log: what its log says, and nothing that needs its weights.
        more: further fields of the record.
    """
    records = read_metrics(folder / "metrics.jsonl")
    last = [record for record in records if "val/main_loss" in record][-1]
    metrics = {key: value for key, value in last.items() if key.startswith(("val/", "task/"))}
    metrics |= late_mean(records, "moe/max_violation", "train/max_violation")
    metrics |= late_mean(records, "moe/mtp_max_violation/1", "train/mtp_max_violation/1")
    if run.config.data.task is None and not from_log:
        metrics |= along_text(folder, run)
    metrics |= above_table(metrics)
    draw_sd: dict[str, float] = {}
    if study.acceptance is not None and no_drafter(run.config.mtp) is None:
        drafted, draw_sd = free_running(folder, run, study.acceptance)
        metrics |= drafted
    if study.solve_threshold is not None:
        more["solved_at"] = solved_at(records, study.solve_threshold)
        metrics["task/solved"] = float(more["solved_at"] is not None)
    return describe(study, run, records, starts_of(folder)).model_copy(
        update={"metrics": _finite(metrics), "draw_sd": _finite(draw_sd), **more}
    )


def describe(study: Study, run: Run, records: Sequence[Logged], starts: list[Start]) -> RunRecord:
    """What a record says of every run, before anything is measured."""
    size = size_of(run.config)
    counts: Any = {"training": size.total + size.mtp_total}
    counts |= {"inference": size.total, "active": size.active}
    return RunRecord(
        arm=run.arm,
        seed=run.seed,
        status="finished",
        config=run.config.to_dict(),
        measured=measured_settings(study),
        parameters=counts,
        flops_per_token=size.flops_per_token,
        flops=training_flops(run.config),
        tokens=consumed(run.config),
        forked_from=Fork(run=run.parent, step=run.fork_step) if run.parent else None,
        curves=curves_of(records, every_loss=study.loss_error_against is not None),
        starts=starts,
    )


def starts_of(folder: Path) -> list[Start]:
    """Every start of the run, from its manifest; those that ran on the same are one."""
    starts: dict[str, Start] = {}
    for start in read_starts(folder):
        data = start["data"].items()
        found = Start(
            time=start["time"],
            commit=start["git"],
            dirty=start["git_dirty"],
            python=start["python"],
            versions={name: start["versions"].get(name) for name in ("torch", "deepspeed")},
            device=start["device"],
            threads=start["threads"],
            data={role: Data(path=d["path"], hash=d["manifest_hash"]) for role, d in data},
        )
        starts[found.model_copy(update={"time": ""}).model_dump_json()] = found
    return list(starts.values())


def curves_of(records: Sequence[Logged], *, every_loss: bool) -> dict[str, Curve]:
    """What the pictures are drawn from. every_loss: also the training losses of every step."""
    curves = {}
    for key in dict.fromkeys(key for record in records for key in record):
        if key == "val/main_loss" or key in SMOOTH or (every_loss and key.startswith(LOSSES)):
            points = [(r["tokens"], r[key]) for r in records if key in r]
            points = [(tokens, value) for tokens, value in points if math.isfinite(value)]
            points = list(_parts(points)) if key in SMOOTH else points
            if points:
                tokens, values = zip(*points, strict=True)
                curves[key] = Curve(tokens=tokens, values=[float(f"{v:.7g}") for v in values])
    return curves


def _parts(points: Sequence[tuple[int, float]]) -> Iterator[tuple[int, float]]:
    """At most PARTS points: the last tokens and the mean of equal parts of the curve."""
    width = max(1, -(-len(points) // PARTS))
    for first in range(0, len(points), width):
        part = points[first : first + width]
        yield part[-1][0], fmean(value for _, value in part)


def along_text(folder: Path, run: Run) -> dict[str, float]:
    """The table drafters' floors with this run's main model; `shift/...`, the validation on
    packages that were held out whole, where the corpus has them; and `renamed/...`, whether it
    copies names that it has never seen, where the text is Python.
    """
    if not isinstance(run.config.data.val, str):
        return {}  # a source of another kind has no text to read by position
    config, model = run.config, _model(folder, run)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)
    path, batches = run.config.data.val, config.eval.batches
    val = open_source(path, "val")
    metrics, _ = drafter_floors(model, val, config, batches=batches, device=device)
    if SHIFT in splits_of(path):
        source = open_source(path, SHIFT)
        shifted = validate(model, source, config, batches=batches, device=device)
        metrics |= {key.replace("val/", "shift/", 1): value for key, value in shifted.items()}
    if (tokenizer := tokenizer_of(config, folder)) is not None:
        encoder = recorded_encoder(tokenizer, config.model.vocab_size)
        windows = renamed_windows(val, encoder, count=RENAMED, length=config.data.seq_len)
        metrics |= second_tokens(model, windows, device=device)
    return metrics


def above_table(metrics: Mapping[str, float]) -> dict[str, float]:
    """Overlap minus the table drafter's with the same trunk: fair between trunks trained apart."""
    depths = [k for k in depths_of(metrics, OVERLAP) if f"{TABLE}/{k}" in metrics]
    return {f"{ABOVE}/{k}": metrics[f"{OVERLAP}/{k}"] - metrics[f"{TABLE}/{k}"] for k in depths}


def _finite(metrics: Mapping[str, float]) -> dict[str, float]:
    return {key: float(value) for key, value in metrics.items() if math.isfinite(value)}


def late_mean(records: Sequence[Logged], key: str, name: str) -> dict[str, float]:
    values = [record[key] for record in records if key in record and record["progress"] >= 0.75]
    return {name: sum(values) / len(values)} if values else {}


def smoothed(losses: Sequence[float]) -> list[float]:
    """Exponential moving average with 0.9, as V3's appendix B.1 smooths training losses."""
    means = list(losses[:1])
    for loss in losses[1:]:
        means.append(0.9 * means[-1] + 0.1 * loss)
    return means


def loss_errors(
    curves: Mapping[str, Curve], reference: Mapping[str, Curve]
) -> dict[str, dict[int, float]]:
    """V3's relative loss error: training loss -> tokens -> smoothed loss relative to the
    reference's, %.

    Both runs log every step; of a run that diverged there are its first steps.
    """
    errors: dict[str, dict[int, float]] = {}
    for key in curves.keys() & reference.keys():
        if key.startswith(LOSSES):
            ours, theirs = dict(curves[key].points), dict(reference[key].points)
            tokens = [t for t in ours if t in theirs]
            means = (smoothed([side[t] for t in tokens]) for side in (ours, theirs))
            errors[key] = {t: 100 * (a / b - 1) for t, a, b in zip(tokens, *means, strict=True)}
    return errors


def loss_error_metrics(
    curves: Mapping[str, Curve], reference: Mapping[str, Curve], *, total_tokens: int
) -> dict[str, float]:
    """train/main_loss_error: mean over the last quarter of training; ..._max: its largest size.

    And train/mtp_loss_error/k, train/mtp_loss_error_max/k. The reference itself has no largest
    sizes: against its zeros every size would be an effect.
    """
    metrics: dict[str, float] = {}
    for key, errors in loss_errors(curves, reference).items():
        at_end = [error for tokens, error in errors.items() if tokens >= 0.75 * total_tokens]
        if at_end:
            metrics[key.replace("_loss", "_loss_error")] = sum(at_end) / len(at_end)
            if curves is not reference:
                metrics[key.replace("_loss", "_loss_error_max")] = max(map(abs, errors.values()))
    return metrics


def solved_at(records: Sequence[Logged], threshold: float) -> int | None:
    """Tokens at the first validation with task/exact_match >= threshold."""
    reached = (record["tokens"] for record in records if record.get(SOLVED, -1.0) >= threshold)
    return next(reached, None)


def free_running(
    folder: Path, run: Run, drafts: AcceptanceSection
) -> tuple[dict[str, float], dict[str, float]]:
    """Acceptance at temperature 0 and 1 of as many drafts as the heads make, and at 1 what a token
    costs, plainly decoded and with drafts in turn.

    The prefixes are dealt to `draws` sets, each decoded with random numbers of its own: (means over
    the sets, standard deviations of these means, from the spread over the sets).
    """
    model = _model(folder, run).to("cuda" if torch.cuda.is_available() else "cpu")
    # a study's runs share the cores; a GPU's work is not in a process's own time
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    source = validation_source(run.config)
    found: dict[str, list[float]] = {}
    for temperature, draw in itertools.product((0, 1), range(drafts.draws)):
        seconds, one = [], {}
        # not at temperature 0, which comes first and pays for what is made once
        for depth in (0, run.config.mtp.drafts) if temperature else (run.config.mtp.drafts,):
            started = clock()
            one = acceptance(
                model,
                source,
                depth=depth,
                prompts=drafts.prefixes,
                part=(draw, drafts.draws),
                seq_len=2 * drafts.prefix_tokens,
                new_tokens=drafts.new_tokens,
                temperature=float(temperature),
                seed=_draw_seed(run.name, draw),
            )
            seconds.append(clock() - started)
        if one and temperature:  # {}: the task's answers are too short for drafts
            one["plain_over_drafting"] = seconds[0] / seconds[1]
        for key, value in one.items():
            name = key.removeprefix("val/").replace("acceptance/", "joint/")
            found.setdefault(f"acceptance/T{temperature}/{name}", []).append(value)
    means = {key: fmean(values) for key, values in found.items()}
    many = {key: values for key, values in found.items() if len(values) > 1}
    return means, {key: stdev(values) / math.sqrt(len(values)) for key, values in many.items()}


def _model(folder: Path, run: Run) -> DeepseekV3MTP:
    """The study's own file has named the code that the run's config names."""
    return load_model(folder, trust_code=code.named(run.config.to_dict())).model


def _draw_seed(name: str, draw: int) -> int:
    """Of its own for every run and draw: runs that shared one would agree more than they should."""
    return int.from_bytes(hashlib.sha256(f"{name}, draw {draw}".encode()).digest()[:7])
