"""What is measured once a run is trained, and the file that says so: results.json in the run
folder.

A run with results.json is finished. Metric names: `val/...` and `task/...` of the last validation,
`acceptance/T0/...` (greedy) and `acceptance/T1/...` of free-running drafts, `train/max_violation`
over the last quarter of training. The report adds `train/main_loss_error` and its like, which need
the runs of another arm.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired

import torch
from pydantic import Field, with_config
from typing_extensions import TypedDict

from dsv3_mtp.config import Config
from dsv3_mtp.data.opening import validation_source
from dsv3_mtp.files.atomic import write_json
from dsv3_mtp.files.checked import OPEN, read_json
from dsv3_mtp.report.metrics import Record, read_metrics
from dsv3_mtp.runs.model import load_run
from dsv3_mtp.study.expand import Run, consumed, size_of, training_flops
from dsv3_mtp.study.matrix import Acceptance
from dsv3_mtp.train.evaluate import acceptance

RESULTS = "results.json"
SOLVED = "task/exact_match"
LOSSES = ("train/main_loss", "train/mtp_loss/")


@with_config(OPEN)
class Parameters(TypedDict):
    """Counts of the model's parameters."""

    training: int
    inference: int
    active: int


@with_config(OPEN)
class Measured(TypedDict):
    """What every run has: its numbers at the start."""

    arm: str
    seed: int
    settings: dict[str, Any]
    parameters: Parameters
    tokens: int


@with_config(OPEN)
class Diverged(Measured):
    """results.json of a run that stopped at a number that is not finite."""

    status: Literal["diverged"]
    error: str


@with_config(OPEN)
class Finished(Measured):
    """results.json of a run that reached its end."""

    status: Literal["finished"]
    metrics: dict[str, float]
    seconds_per_token: float
    solved_at: NotRequired[int | None]


RESULT: Any = Annotated[Diverged | Finished, Field(discriminator="status")]


def read_results(folder: Path) -> dict[str, Any] | None:
    """results.json of a run folder; None when there is none.

    Raises:
        ValueError: it is damaged.
    """
    path = folder / RESULTS
    if not path.exists():
        return None
    return {**read_json(path, RESULT, "delete this file, and it is measured again")}


def write_results(folder: Path, results: Mapping[str, Any]) -> None:
    write_json(folder / RESULTS, results)


def describe(run: Run, *, settings: dict[str, Any]) -> dict[str, Any]:
    """What results.json says of every run, trained or failed."""
    size = size_of(run.config)
    return {
        "arm": run.arm,
        "seed": run.seed,
        "settings": settings,
        "parameters": {
            "training": size.total + size.mtp_total,
            "inference": size.total,
            "active": size.active,
        },
        "flops_per_token": size.flops_per_token,
        "flops": training_flops(run.config),
        "tokens": consumed(run.config),
        "forked_from": {"run": run.parent, "step": run.fork_step} if run.parent else None,
    }


def measure(
    folder: Path, config: Config, *, drafts: Acceptance | None, threshold: float | None
) -> dict[str, Any]:
    """Metrics of a trained run, and when it solved its task (tokens; None: not within its
    budget).
    """
    records = read_metrics(folder / "metrics.jsonl")
    last = [record for record in records if "val/main_loss" in record][-1]
    metrics = {key: value for key, value in last.items() if key.startswith(("val/", "task/"))}
    metrics |= late_mean(records, "moe/max_violation", "train/max_violation")
    metrics |= late_mean(records, "moe/mtp_max_violation/1", "train/mtp_max_violation/1")
    if drafts is not None and config.mtp.depths:
        metrics |= free_running(folder, config, drafts)
    found: dict[str, Any] = {"metrics": metrics}
    if threshold is not None:
        found["solved_at"] = solved_at(records, threshold)
        metrics["task/solved"] = float(found["solved_at"] is not None)
    return found


def late_mean(records: Sequence[Record], key: str, name: str) -> dict[str, float]:
    values = [record[key] for record in records if key in record and record["progress"] >= 0.75]
    return {name: sum(values) / len(values)} if values else {}


def smoothed(losses: Sequence[float]) -> list[float]:
    """Exponential moving average with 0.9, as V3's appendix B.1 smooths training losses."""
    means = list(losses[:1])
    for loss in losses[1:]:
        means.append(0.9 * means[-1] + 0.1 * loss)
    return means


def loss_errors(
    records: Sequence[Record], reference: Sequence[Record]
) -> dict[str, dict[int, float]]:
    """V3's relative loss error: key of a training loss -> tokens -> smoothed loss relative to the
    reference's, in %.

    Both runs log every step; of a run that diverged there are its first steps.
    """
    errors: dict[str, dict[int, float]] = {}
    for key in {key for record in records for key in record if key.startswith(LOSSES)}:
        ours, theirs = (
            {r["tokens"]: r[key] for r in side if key in r} for side in (records, reference)
        )
        tokens = [t for t in ours if t in theirs]
        means = (smoothed([side[t] for t in tokens]) for side in (ours, theirs))
        errors[key] = {t: 100 * (a / b - 1) for t, a, b in zip(tokens, *means, strict=True)}
    return errors


def loss_error_metrics(records: Sequence[Record], reference: Sequence[Record]) -> dict[str, float]:
    """train/main_loss_error: mean over the last quarter of training; train/main_loss_error_max:
    largest size.

    And train/mtp_loss_error/k, train/mtp_loss_error_max/k. The reference itself has no largest
    sizes: against its zeros every size would be an effect.
    """
    late = {record["tokens"] for record in records if record["progress"] >= 0.75}
    metrics: dict[str, float] = {}
    for key, errors in loss_errors(records, reference).items():
        at_end = [error for tokens, error in errors.items() if tokens in late]
        if at_end:
            metrics[key.replace("_loss", "_loss_error")] = sum(at_end) / len(at_end)
            if records is not reference:
                metrics[key.replace("_loss", "_loss_error_max")] = max(map(abs, errors.values()))
    return metrics


def solved_at(records: Sequence[Record], threshold: float) -> int | None:
    """Tokens at the first validation with task/exact_match >= threshold."""
    return next(
        (record["tokens"] for record in records if record.get(SOLVED, -1.0) >= threshold), None
    )


def free_running(folder: Path, config: Config, drafts: Acceptance) -> dict[str, float]:
    """Acceptance at temperature 0 and 1 of as many drafts as the model has depths."""
    model = load_run(folder).model.to("cuda" if torch.cuda.is_available() else "cpu")
    metrics: dict[str, float] = {}
    source = validation_source(config)
    for temperature in (0, 1):
        found = acceptance(
            model,
            source,
            depth=config.mtp.depths,
            prompts=drafts.prefixes,
            seq_len=2 * drafts.prefix_tokens,
            new_tokens=drafts.new_tokens,
            temperature=float(temperature),
        )
        for key, value in found.items():
            name = key.removeprefix("val/").replace("acceptance/", "joint/")
            metrics[f"acceptance/T{temperature}/{name}"] = value
    return metrics
