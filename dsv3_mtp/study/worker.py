"""The process of one run of a study: claims its folder, trains, measures, writes results.json."""

import multiprocessing
import os
import shutil
import signal
import sys
import threading
import traceback
from multiprocessing import connection
from pathlib import Path

from pydantic import with_config
from typing_extensions import TypedDict

from dsv3_mtp.files.atomic import lock, write_json
from dsv3_mtp.files.checked import OPEN, read_json
from dsv3_mtp.files.run_folder import is_complete, newest_checkpoint
from dsv3_mtp.report.metrics import MetricsLog, read_metrics
from dsv3_mtp.study.archive import read_results, write_results
from dsv3_mtp.study.expand import Run
from dsv3_mtp.study.matrix import Study
from dsv3_mtp.study.measure import describe, measure, starts_of
from dsv3_mtp.study.training import train, train_on_ranks

TIME = "time.json"  # in a run folder
STOPPED, ELSEWHERE = 3, 4  # exit codes


def claim(folder: Path) -> int:
    """Holds a run until the descriptor is closed. Raises ValueError: another process does."""
    return lock(folder / ".study.lock", f"{folder}: another process works on this run")


def is_claimed(folder: Path) -> bool:
    """Some process works on the run."""
    if not (folder / ".study.lock").exists():
        return False
    try:
        os.close(claim(folder))
    except ValueError:
        return True
    return False


def work(study: Study, run: Run, command: list[str]) -> None:
    """The process of one run, start to end. It exits with the code of `train_and_measure`."""
    folder = study.folder / run.name
    try:
        held = claim(folder)
    except ValueError:
        os._exit(ELSEWHERE)
    log = os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    code = 1
    try:
        code = train_and_measure(study, run, command, held=held)
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


def train_and_measure(study: Study, run: Run, command: list[str], *, held: int) -> int:
    """Trains the run to its end and writes results.json.

    held: descriptor of the run's lock.

    Returns the exit code: 0 it is closed, STOPPED it was asked to stop.
    """
    folder, ranks = study.folder / run.name, study.ranks
    if run.parent is not None:
        tokens = run.config.train.total_tokens
        fork(study.folder / run.parent, folder, run.fork_step, total_tokens=tokens)
    if ranks == 1:
        trained = train(run.config, command)
    else:
        trained = train_on_ranks(run.config, command, ranks=ranks, held=held)
    if (error := trained["error"]) is not None:
        record = describe(study, run, read_metrics(folder / "metrics.jsonl"), starts_of(folder))
        write_results(folder, record.model_copy(update={"status": "diverged", "error": error}))
        return 0
    spent, tokens = add_time(folder, trained["seconds"], trained["tokens"])
    if not trained["finished"]:
        return STOPPED
    before = read_results(folder)
    if tokens:
        pace = spent / tokens
    elif before and before.seconds_per_token:
        pace = before.seconds_per_token
    else:  # of another version, or killed just before the time was written
        pace = trained["pace"]
    write_results(folder, measure(study, run, folder, seconds_per_token=pace))
    return 0


@with_config(OPEN)
class Spent(TypedDict):
    """time.json."""

    seconds: float
    tokens: int


def add_time(folder: Path, seconds: float, tokens: int) -> tuple[float, int]:
    """What training has cost in all starts of a run: (seconds, tokens), kept in time.json.

    A start that trains nothing, of a run that was still to be measured, adds nothing.
    """
    path = folder / TIME
    if path.exists():
        earlier = read_json(path, Spent, "delete it: the time of this start alone will count")
        seconds, tokens = earlier["seconds"] + seconds * (tokens > 0), earlier["tokens"] + tokens
    if tokens:
        write_json(path, {"seconds": seconds, "tokens": tokens})
    return seconds, tokens


def fork(parent: Path, child: Path, step: int, *, total_tokens: int) -> None:
    """Makes `child` a run at `step` with the parent's state and log.

    total_tokens: of the child, whose progress at these steps is another than the parent's if its
    length is another. Without that checkpoint (the parent was pruned) it trains from the start,
    which gives the same numbers.
    """
    source, target = (run / "checkpoints" / f"global_step{step}" for run in (parent, child))
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
