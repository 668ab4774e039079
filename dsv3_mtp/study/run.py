"""Runs a study: one process per run, as many at a time as asked; nothing finished is repeated.

Each process is forked from this one, which has imported everything once (on a GPU it is started
afresh: CUDA does not survive a fork). A kill of a run, or of all, loses at most the steps since its
last checkpoint. Any number of such programs may share a study, on every machine that sees its
folder: each run is claimed by a lock of its own.
"""

import multiprocessing
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

# an import of seconds that training makes: once here, not in every forked process
import torch._dynamo

from dsv3_mtp.data.opening import build_missing, open_sources
from dsv3_mtp.files.run_folder import checkpoints
from dsv3_mtp.report.metrics import read_metrics
from dsv3_mtp.report.progress import duration
from dsv3_mtp.study.archive import read_results
from dsv3_mtp.study.expand import Run, expand
from dsv3_mtp.study.folder import budgets_of, check_folders, is_closed, records_of
from dsv3_mtp.study.load import LoadedStudy
from dsv3_mtp.study.matrix import Study
from dsv3_mtp.study.plan import freeze
from dsv3_mtp.study.worker import ELSEWHERE, is_claimed, work

PROGRESS_S = 30.0  # between lines about the runs that are active
POLL_S = 2.0  # how often a run that another program works on is looked at


def run_study(
    loaded: LoadedStudy,
    *,
    only: Callable[[Run], bool],
    jobs: int,
    say: Callable[[str], None] = print,
) -> list[str]:
    """Trains and measures every run that `only` chooses; returns the names of those that failed.

    Arms with another's measured time follow when that arm's runs are finished. Runs that another
    program works on are waited for only where something here depends on them.

    Raises:
        ValueError: a run folder holds a run of other settings, `only` chooses nothing, or the data
            of a run cannot be used; or a run has more ranks than this host has GPUs.
    """
    study, failed = loaded.study, []
    if 0 < (seen := devices()) < study.ranks:
        text = f"a run has {study.ranks} processes, and this host has {seen} GPU(s)"
        raise ValueError(f"scales.{study.scale}.ranks: {text}")
    budgets, runs = _planned(loaded, only)
    study.folder.mkdir(parents=True, exist_ok=True)
    freeze(loaded, len(records_of(loaded)))
    while True:
        chosen = [run for run in runs if only(run) and run.name not in failed]
        check_data([run for run in chosen if not is_closed(study, run)])
        pool = _Pool(study, runs, jobs, say)
        failed += pool.work_through(chosen)
        if pool.hopeless or budgets_of(loaded).keys() <= budgets.keys():
            return failed
        budgets, runs = _planned(loaded, only)


def _planned(loaded: LoadedStudy, only: Callable[[Run], bool]) -> tuple[dict[str, int], list[Run]]:
    """The budgets known by now, and the runs planned with them. Raises as `run_study`."""
    budgets = budgets_of(loaded)
    runs = expand(loaded, budgets)
    check_folders(loaded.study, runs)
    if not any(map(only, runs)):
        names = ", ".join(dict.fromkeys(run.arm for run in runs))
        text = "none of the runs that can be planned now is called so"
        raise ValueError(f"--only: {text}; their arms are {names}")
    return budgets, runs


def check_data(runs: Sequence[Run]) -> None:
    """Opens what the runs are trained on, once each. Raises ValueError: all that cannot be used."""
    problems: dict[str, None] = {}
    configs = [run.config for run in runs]
    keys = [repr((c.data, c.mtp.lookahead, c.mtp.depths, c.model.vocab_size)) for c in configs]
    for config in dict(zip(keys, configs, strict=True)).values():
        try:
            build_missing(config)
            open_sources(config)
        except (ValueError, OSError) as error:
            problems[str(error)] = None
    if problems:
        raise ValueError("\n".join(problems))


@dataclass(frozen=True)
class _Active:
    process: BaseProcess
    run: Run
    started: float
    slot: int  # number of the worker, and so of its devices


class _Pool:
    """Works through runs, `jobs` at a time; a run waits for the one that it forks from."""

    def __init__(
        self, study: Study, runs: Sequence[Run], jobs: int, say: Callable[[str], None]
    ) -> None:
        self.study, self.runs, self.jobs, self.say = study, runs, jobs, say
        self.active: dict[Any, _Active] = {}
        self.reasons: dict[str, str] = {}  # of failures: the last line of a log -> arm
        self.succeeded = self.hopeless = False
        self.said = time.monotonic()

    def work_through(self, chosen: Sequence[Run]) -> list[str]:
        """Returns the names of the runs that failed."""
        waiting = [run for run in chosen if not is_closed(self.study, run)]
        total, failed, elsewhere = len(waiting), [], []
        try:
            while waiting or self.active:
                for run in self._ready(waiting):
                    waiting.remove(run)
                    if is_closed(self.study, run):  # by another program, in the meantime
                        total -= 1
                    elif is_claimed(self.study.folder / run.name):
                        elsewhere.append(run)
                        total -= 1
                    else:
                        self._start(run)
                if not self.active and waiting:  # for a run that another program works on
                    time.sleep(POLL_S)
                self._say_progress()
                timeout = POLL_S if waiting else PROGRESS_S
                for sentinel in connection.wait(list(self.active), timeout) if self.active else ():
                    done = self.active.pop(sentinel)
                    done.process.join()
                    if done.process.exitcode == ELSEWHERE:
                        elsewhere.append(done.run)
                        total -= 1
                        continue
                    text, good = self._outcome(done)
                    failed += [] if good else [done.run.name]
                    number = total - len(waiting) - len(self.active)
                    seconds = time.monotonic() - done.started
                    self.say(f"[{number}/{total}] {done.run.name}: {text} ({duration(seconds)})")
                    self._judge(done.run, good)
                    if self.hopeless:
                        return failed
                    _prune(self.study, done.run, self.runs)
        finally:
            for item in self.active.values():
                item.process.terminate()
            for item in self.active.values():
                item.process.join()
        open_ones = [run.name for run in elsewhere if not is_closed(self.study, run)]
        if open_ones:
            self.say(f"left to other programs that work on them: {', '.join(open_ones)}")
        return failed

    def _ready(self, waiting: Sequence[Run]) -> list[Run]:
        here = {run.name for run in waiting} | {item.run.name for item in self.active.values()}
        folder = self.study.folder
        ready = [run for run in waiting if run.parent not in here]
        ready = [run for run in ready if not (run.parent and is_claimed(folder / run.parent))]
        return ready[: self.jobs - len(self.active)]

    def _start(self, run: Run) -> None:
        slot = min(set(range(self.jobs)) - {item.slot for item in self.active.values()})
        context: Any = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "fork")
        process = context.Process(target=work, args=(self.study, run, sys.argv), name=run.name)
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        with _visible(devices_of(slot, self.study.ranks, visible, devices())):
            process.start()
        self.active[process.sentinel] = _Active(process, run, time.monotonic(), slot)

    def _say_progress(self) -> None:
        """A line per active run, every PROGRESS_S at first and ever more rarely."""
        now = time.monotonic()
        oldest = min((item.started for item in self.active.values()), default=now)
        if now - self.said < max(PROGRESS_S, 0.1 * (now - oldest)):
            return
        self.said = now
        for item in self.active.values():
            folder = self.study.folder / item.run.name
            self.say(f"  {item.run.name}: {_reached(folder)}; {folder / 'log.txt'}")

    def _judge(self, run: Run, good: bool) -> None:
        """Two arms that fail with the same last words, before any success, stand for all arms."""
        self.succeeded = self.succeeded or good
        if self.succeeded:
            return
        log = self.study.folder / run.name / "log.txt"
        lines = log.read_text(errors="replace").splitlines() if log.exists() else []
        reason = next((line.strip() for line in reversed(lines) if line.strip()), "")
        before = self.reasons.setdefault(reason, run.arm)
        if reason and before != run.arm:
            self.hopeless = True
            self.say(f"{before} and {run.arm} fail alike, so the study stops: {reason}")

    def _outcome(self, done: _Active) -> tuple[str, bool]:
        folder, code = self.study.folder / done.run.name, done.process.exitcode
        record = read_results(folder)
        if code != 0 or record is None:
            return f"FAILED, exit code {code}; see {folder / 'log.txt'}", False
        if not record.finished:
            return f"diverged: {record.error}", True
        name = self.study.primary.metric
        name = name if name in record.metrics else "val/main_loss"
        return f"{name} {record.metrics[name]:.4f}", True


def _reached(folder: Path) -> str:
    """How far a run is, and how long it will take at its mean pace."""
    try:
        records = read_metrics(folder / "metrics.jsonl")
    except (OSError, ValueError):  # not there yet
        return "starting"
    paced = [record for record in records if "perf/tokens_per_s" in record]
    if not paced:
        return "starting"
    done, spent = paced[-1]["progress"], paced[-1]["time_s"]
    left = spent * (1 - done) / done if done and spent else None
    return f"{done:.0%}, loss {paced[-1]['train/main_loss']:.3f}, eta {duration(left)}"


def devices() -> int:
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def devices_of(slot: int, ranks: int, visible: str | None, count: int) -> str | None:
    """CUDA_VISIBLE_DEVICES of a worker, in turn of those that this program sees; None: leave it.

    ranks: of its run. visible: the variable as it is here. count: devices that torch sees.
    """
    if count == 0:
        return None
    names = visible.split(",") if visible else [str(number) for number in range(count)]
    return ",".join(names[(slot * ranks + rank) % count] for rank in range(ranks))


@contextmanager
def _visible(device: str | None) -> Iterator[None]:
    """Processes that are started inside see these devices; this one has chosen its own before."""
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    if device is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = device
    try:
        yield
    finally:
        if device is not None:
            os.environ.pop("CUDA_VISIBLE_DEVICES")
            if before is not None:
                os.environ["CUDA_VISIBLE_DEVICES"] = before


def _prune(study: Study, done: Run, runs: Sequence[Run]) -> None:
    """Deletes the checkpoints of a parent that were kept for runs which are all closed now."""
    children = [run for run in runs if run.parent == done.parent] if done.parent else []
    if children and all(is_closed(study, run) for run in children):
        for old in checkpoints(study.folder / str(done.parent) / "checkpoints")[:-1]:
            shutil.rmtree(old, ignore_errors=True)  # another program may do the same
