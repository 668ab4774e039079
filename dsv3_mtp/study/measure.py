"""What is measured once a run is trained, and the file that says so: results.json in the run folder.

A run with results.json is finished. Metric names: `val/...` and `task/...` of the last validation, `acceptance/T0/...`
(greedy) and `acceptance/T1/...` of free-running drafts, `train/max_violation` over the last quarter of training.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dsv3_mtp.config import Config
from dsv3_mtp.data.source import open_source
from dsv3_mtp.data.tasks import TaskSource
from dsv3_mtp.evaluate import acceptance
from dsv3_mtp.hf import load_run
from dsv3_mtp.metrics import Record, read_metrics, replacing
from dsv3_mtp.study.matrix import Acceptance
from dsv3_mtp.study.plan import Run, consumed, size_of, training_flops

RESULTS = "results.json"
SOLVED = "task/exact_match"


def read_results(folder: Path) -> dict[str, Any] | None:
    """results.json of a run folder; None when there is none.

    Raises:
        ValueError: it is damaged.
    """
    path = folder / RESULTS
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: damaged ({error}); delete this file, and it is measured again") from None


def write_results(folder: Path, results: Mapping[str, Any]) -> None:
    with replacing(folder / RESULTS) as temporary:
        temporary.write_text(json.dumps(results, indent=1, default=str) + "\n", encoding="utf-8")


def describe(run: Run, *, settings: dict[str, Any]) -> dict[str, Any]:
    """What results.json says of every run, trained or failed."""
    size = size_of(run.config)
    return {
        "arm": run.arm,
        "seed": run.seed,
        "settings": settings,
        "parameters": {"training": size.total + size.mtp_total, "inference": size.total, "active": size.active},
        "flops_per_token": size.flops_per_token,
        "flops": training_flops(run.config),
        "tokens": consumed(run.config),
        "forked_from": {"run": run.parent, "step": run.fork_step} if run.parent else None,
    }


def measure(folder: Path, config: Config, *, drafts: Acceptance | None, threshold: float | None) -> dict[str, Any]:
    """Metrics of a trained run, and when it solved its task (tokens; None: not within its budget)."""
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


def solved_at(records: Sequence[Record], threshold: float) -> int | None:
    """Tokens at the first validation with task/exact_match >= threshold."""
    return next((record["tokens"] for record in records if record.get(SOLVED, -1.0) >= threshold), None)


def free_running(folder: Path, config: Config, drafts: Acceptance) -> dict[str, float]:
    """Acceptance at temperature 0 and 1 of as many drafts as the model has depths (DESIGN S14)."""
    model = load_run(folder).model.to("cuda" if torch.cuda.is_available() else "cpu")
    task = config.data.task
    metrics: dict[str, float] = {}
    source = open_source(str(config.data.val), "val") if task is None else TaskSource(task)
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
        names = {key: key.removeprefix("val/").replace("acceptance/", "joint/") for key in found}
        metrics |= {f"acceptance/T{temperature}/{names[key]}": value for key, value in found.items()}
    return metrics
