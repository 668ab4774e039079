"""Runs a study: one process per run, as many at a time as asked; what is finished is never
repeated.

Each process is forked from this one, which has imported everything once (on a GPU it is started
afresh: CUDA does not survive a fork). A kill of a run, or of all, loses at most the steps since its
last checkpoint.
"""

import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

# an import of seconds that training makes: once here, not in every forked process
import torch._dynamo

from dsv3_mtp.config import load_config
from dsv3_mtp.config.resume import FREE, differences
from dsv3_mtp.files.atomic import write_json
from dsv3_mtp.report.metrics import MetricsLog, read_metrics
from dsv3_mtp.report.progress import duration
from dsv3_mtp.runs.folder import lock_folder
from dsv3_mtp.runs.loading import checkpoints, is_complete, newest_checkpoint
from dsv3_mtp.study.expand import Run, expand, whole_steps
from dsv3_mtp.study.matrix import LoadedStudy, Study
from dsv3_mtp.study.measure import describe, measure, read_results, write_results
from dsv3_mtp.train.process import own_process
from dsv3_mtp.train.trainer import NonFiniteError

BUDGETS = "budgets.json"
TIME = "time.json"  # in a run folder
# Of a run that is there: settings that change neither what is learned nor what is measured.
IGNORED = tuple(key for key in FREE if key not in ("eval.batches", "train.micro_batch_size"))
CLOSED = ("finished", "diverged")  # of results.json's status: such a run is not run again


def run_study(
    loaded: LoadedStudy,
    *,
    only: Callable[[Run], bool],
    jobs: int,
    say: Callable[[str], None] = print,
) -> list[str]:
    """Trains and measures every run that `only` chooses; returns the names of those that failed.

    Arms with another's measured time follow when that arm's runs are finished.

    Raises:
        ValueError: another process works on this study, a run folder holds a run of other settings,
            or `only` chooses nothing.
    """
    study = loaded.study
    failed: list[str] = []
    lock = lock_folder(study.folder)
    try:
        while True:
            budgets = read_budgets(study.folder)
            runs = expand(loaded, budgets)
            check_folders(study, runs)
            if not any(map(only, runs)):
                names = ", ".join(dict.fromkeys(run.arm for run in runs))
                raise ValueError(
                    "--only: none of the runs that can be planned "
                    f"now is called so; their arms are {names}"
                )
            chosen = [run for run in runs if only(run) and run.name not in failed]
            failed += _execute(study, runs, chosen, jobs, say)
            if not (more := new_budgets(loaded, budgets)):
                return failed
            write_json(study.folder / BUDGETS, budgets | more)
    finally:
        os.close(lock)


def read_budgets(folder: Path) -> dict[str, int]:
    """total_tokens of the arms that match another's measured time: fixed once, so that every seed
    has the same.
    """
    path = folder / BUDGETS
    return json.loads(path.read_text()) if path.exists() else {}


def new_budgets(loaded: LoadedStudy, budgets: Mapping[str, int]) -> dict[str, int]:
    """Budgets that can be fixed now: all seeds of both arms that they depend on are closed;
    finished ones count.
    """
    study = loaded.study
    found: dict[str, int] = {}
    for name, arm in study.arms.items():
        if arm.match is None or arm.match.by != "cpu_time" or name in budgets:
            continue
        closed = [_closed(study, other) for other in (arm.match.arm, str(arm.match.pace))]
        sides = [
            [results for results in side if results["status"] == "finished"] for side in closed
        ]
        if all(len(side) == len(study.seeds) for side in closed) and all(sides):
            seconds = _mean([r["seconds_per_token"] * r["tokens"] for r in sides[0]])
            pace = _mean([r["seconds_per_token"] for r in sides[1]])
            found[name] = whole_steps(loaded.configs[name], seconds / pace)
    return found


def _closed(study: Study, arm: str) -> list[dict[str, Any]]:
    found = [read_results(study.folder / f"{arm}-seed{seed}") for seed in study.seeds]
    return [results for results in found if results is not None and results["status"] in CLOSED]


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def is_closed(study: Study, run: Run) -> bool:
    """The run is trained, or diverged, and was measured as the study asks."""
    results = read_results(study.folder / run.name)
    return (
        results is not None
        and results["status"] in CLOSED
        and results["settings"] == settings_of(study)
    )


def settings_of(study: Study) -> dict[str, Any]:
    """What results.json depends on beside the run's config."""
    return study.model_dump(mode="json", include={"acceptance", "solve_threshold"})


def check_folders(study: Study, runs: list[Run]) -> None:
    """Raises ValueError when a run folder holds a run of other settings than the study's."""
    problems = []
    for run in runs:
        path = study.folder / run.name / "config.yaml"
        if path.exists():
            other = differences(load_config(path).to_dict(), run.config.to_dict(), ignoring=IGNORED)
            problems += [
                f"{path}: {key} is {old}, the study says {new}" for key, (old, new) in other.items()
            ]
    if problems:
        raise ValueError(
            "run folders of other settings; delete them, or give the study another run.name:\n  "
            + "\n  ".join(problems)
        )


def _execute(
    study: Study, runs: list[Run], chosen: list[Run], jobs: int, say: Callable[[str], None]
) -> list[str]:
    """Works through the chosen ones of all runs; a run waits for the one that it forks from."""
    waiting = [run for run in chosen if not is_closed(study, run)]
    total, failed = len(waiting), []
    active: dict[Any, tuple[BaseProcess, Run, float]] = {}
    try:
        while waiting or active:
            open_names = {run.name for run in waiting} | {run.name for _, run, _ in active.values()}
            ready = [run for run in waiting if run.parent not in open_names]
            for run in ready[: jobs - len(active)]:
                process = _start(study, run)
                active[process.sentinel] = (process, run, time.monotonic())
                waiting.remove(run)
            for sentinel in connection.wait(list(active)):
                process, run, started = active.pop(sentinel)
                process.join()
                text, good = _outcome(study, run, process.exitcode)
                failed += [] if good else [run.name]
                number = total - len(waiting) - len(active)
                say(
                    f"[{number}/{total}] {run.name}: {text} "
                    f"({duration(time.monotonic() - started)})"
                )
                _prune(study, run, runs)
    finally:
        for process, _, _ in active.values():
            process.terminate()
        for process, _, _ in active.values():
            process.join()
    return failed


def _start(study: Study, run: Run) -> BaseProcess:
    context: Any = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "fork")
    process = context.Process(target=_worker, args=(study, run, sys.argv), name=run.name)
    process.start()
    return process


def _outcome(study: Study, run: Run, exitcode: int | None) -> tuple[str, bool]:
    results = read_results(study.folder / run.name)
    if exitcode != 0 or results is None:
        return f"FAILED, exit code {exitcode}; see {study.folder / run.name / 'log.txt'}", False
    if results["status"] == "diverged":
        return f"diverged: {results['error']}", True
    name = study.primary.metric
    value = results["metrics"].get(name, results["metrics"]["val/main_loss"])
    return f"{name if name in results['metrics'] else 'val/main_loss'} {value:.4f}", True


def _prune(study: Study, done: Run, runs: list[Run]) -> None:
    """Deletes the checkpoints of a parent that were kept for runs which are all closed now."""
    children = [run for run in runs if run.parent == done.parent] if done.parent else []
    if children and all(is_closed(study, run) for run in children):
        for old in checkpoints(study.folder / str(done.parent) / "checkpoints")[:-1]:
            shutil.rmtree(old)


# --- in the process of one run ------------------------------------------------------------------------------


def _worker(study: Study, run: Run, command: list[str]) -> None:
    folder = study.folder / run.name
    folder.mkdir(parents=True, exist_ok=True)
    log = os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    code = 1
    try:
        code = train_and_measure(study, run, command)
    except Exception:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # gloo's threads may abort a normal exit


def _end_with_parent() -> None:
    """A study that was killed must not leave runs behind that hold its folders."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGTERM)


def train_and_measure(study: Study, run: Run, command: list[str]) -> int:
    """Trains the run to its end and writes results.json; returns the exit code, 3 when it was asked
    to stop.
    """
    folder, settings = study.folder / run.name, settings_of(study)
    if run.parent is not None:
        fork(
            study.folder / run.parent,
            folder,
            run.fork_step,
            total_tokens=run.config.train.total_tokens,
        )
    results = describe(run, settings=settings)
    try:
        trainer = own_process(run.config, command=command)
        begun, first = _seconds(trainer), trainer.tokens
        trainer.run()
    except NonFiniteError as error:
        write_results(folder, results | {"status": "diverged", "error": str(error)})
        return 0
    spent, tokens = add_time(folder, _seconds(trainer) - begun, trainer.tokens - first)
    if trainer.progress < 1:
        return 3
    before = read_results(folder)
    if tokens:
        pace = spent / tokens
    else:  # of another version, or killed just before the time was written
        pace = before["seconds_per_token"] if before else trainer.clock.seconds / trainer.tokens
    found = measure(folder, run.config, drafts=study.acceptance, threshold=study.solve_threshold)
    write_results(folder, results | found | {"status": "finished", "seconds_per_token": pace})
    return 0


def add_time(folder: Path, seconds: float, tokens: int) -> tuple[float, int]:
    """What training has cost in all starts of a run: (seconds, tokens), kept in time.json.

    A start that trains nothing adds nothing: a run that was interrupted while it was measured, or
        is measured anew.
    """
    path = folder / TIME
    if path.exists():
        earlier = json.loads(path.read_text())
        seconds, tokens = earlier["seconds"] + seconds * (tokens > 0), earlier["tokens"] + tokens
    if tokens:
        write_json(path, {"seconds": seconds, "tokens": tokens})
    return seconds, tokens


def _seconds(trainer: Any) -> float:
    """Time that training costs: of this process on a CPU, which other processes do not lengthen
    much; else elapsed.
    """
    return time.process_time() if trainer.world.device.type == "cpu" else trainer.clock.seconds


def fork(parent: Path, child: Path, step: int, *, total_tokens: int) -> None:
    """Makes `child` a run at `step` with the parent's state and log: it goes on as it would have
    trained so far.

    total_tokens: of the child, whose progress at these steps is another than the parent's if its
    length is another. Without that checkpoint (the parent was pruned) it trains from the start,
    which gives the same numbers.
    """
    source, target = (
        parent / "checkpoints" / f"global_step{step}",
        child / "checkpoints" / f"global_step{step}",
    )
    if newest_checkpoint(child / "checkpoints") is not None:
        return
    if not is_complete(source):
        print(f"{source}: not there; training from the start", flush=True)
        return
    (child / "metrics.jsonl").unlink(missing_ok=True)
    log = MetricsLog(child / "metrics.jsonl")
    for record in read_metrics(parent / "metrics.jsonl"):
        if record["step"] <= step:
            log.append(record | {"progress": min(record["tokens"] / total_tokens, 1.0)})
    partial = child / "checkpoints.partial"
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(source, partial)
    target.parent.mkdir(exist_ok=True)
    shutil.rmtree(target, ignore_errors=True)
    os.replace(partial, target)
    print(f"forked from {source}", flush=True)
