"""Runs a study: one process per run, as many at a time as asked; what is finished is never
repeated.

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
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import torch._dynamo  # an import of seconds that training makes: once here, not in every forked process

from dsv3_mtp.config import Config, load_config
from dsv3_mtp.report.progress import duration
from dsv3_mtp.runs.folder import FREE, differences
from dsv3_mtp.runs.loading import checkpoints
from dsv3_mtp.study.archive import Record, read_archive, read_results, write_results
from dsv3_mtp.study.expand import Run, expand, whole_steps
from dsv3_mtp.study.load import LoadedStudy
from dsv3_mtp.study.matrix import Study
from dsv3_mtp.study.measure import measure, measured_settings
from dsv3_mtp.study.plan import PLAN, freeze, load_archive, read_plan, write_plan
from dsv3_mtp.study.worker import ELSEWHERE, claim, is_claimed, work

# Of a run that is there: settings that change neither what is learned nor what is measured.
IGNORED = (*(k for k in FREE if k not in ("eval", "train.micro_batch_size")), "eval.every")
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
        ValueError: a run folder holds a run of other settings, or `only` chooses nothing.
    """
    study = loaded.study
    study.folder.mkdir(parents=True, exist_ok=True)
    freeze(loaded, len(records_of(loaded)))
    failed: list[str] = []
    while True:
        budgets = budgets_of(loaded)
        runs = expand(loaded, budgets)
        check_folders(study, runs)
        if not any(map(only, runs)):
            names = ", ".join(dict.fromkeys(run.arm for run in runs))
            raise ValueError(
                "--only: none of the runs that can be planned now is called so; their arms are "
                f"{names}"
            )
        chosen = [run for run in runs if only(run) and run.name not in failed]
        failed += _Pool(study, runs, jobs, say).work_through(chosen)
        if budgets_of(loaded).keys() <= budgets.keys():
            return failed


def report_study(loaded: LoadedStudy, out: Path | None = None) -> Path:
    """The report on what has been run, into `out` or the study's folder; returns report.md.

    Raises:
        ValueError: nothing has been run, a run folder holds a run of other settings, or a
        results.json
            or the plan is damaged.
    """
    from dsv3_mtp.study.report import write_report  # matplotlib, which training does not need

    study = loaded.study
    check_folders(study, expand(loaded, budgets_of(loaded)))
    records = records_of(loaded)
    study.folder.mkdir(parents=True, exist_ok=True)
    return write_report(loaded, freeze(loaded, len(records)), records, out or study.folder)


def load_archived(folder: Path, sets: tuple[str, ...] = ()) -> LoadedStudy:
    """The study of an archive, with its records and its plan in the study's folder: to go on with
    it.

    Raises:
        ValueError: the archive is damaged, or the folder has a plan of its own.
    """
    loaded, plan = load_archive(folder, sets), read_plan(folder)
    target = loaded.study.folder
    target.mkdir(parents=True, exist_ok=True)
    if (target / PLAN).exists() and read_plan(target).hash != plan.hash:
        raise ValueError(f"{target}: holds another study; give it --set run.name=NAME")
    if not (target / PLAN).exists():
        write_plan(target, plan)
    unpack(loaded.study, read_archive(folder))
    return loaded


def records_of(loaded: LoadedStudy) -> list[Record]:
    """The records in the study's run folders that are of its arms and seeds and were measured as it
    asks.
    """
    study, found = loaded.study, []
    for seed in study.seeds:
        for arm in study.arms:
            record = read_results(study.folder / f"{arm}-seed{seed}")
            if record is not None and record.measured == measured_settings(study):
                found.append(record)
    return found


def budgets_of(loaded: LoadedStudy) -> dict[str, int]:
    """total_tokens of the arms with another's measured time: of their own runs, else from the
    measurement.

    An arm is left out until all seeds of both arms that it depends on are closed; finished ones
    count.
    """
    study = loaded.study
    found: dict[str, int] = {}
    for name, arm in study.arms.items():
        if arm.match is None or arm.match.by != "cpu_time":
            continue
        begun = next(_budgets_begun(study, name), None)
        sides = [_closed(study, other) for other in (arm.match.arm, str(arm.match.pace))]
        paces = [
            [(r.seconds_per_token, r.tokens) for r in side if r.finished and r.seconds_per_token]
            for side in sides
        ]
        if begun is not None:
            found[name] = begun
        elif all(len(side) == len(study.seeds) for side in sides) and all(paces):
            seconds = fmean(pace * tokens for pace, tokens in paces[0])
            found[name] = whole_steps(
                loaded.configs[name], seconds / fmean(pace for pace, _ in paces[1])
            )
    return found


def _budgets_begun(study: Study, arm: str) -> Iterator[int]:
    for seed in study.seeds:
        folder = study.folder / f"{arm}-seed{seed}"
        record = read_results(folder)
        if record is not None:
            yield record.config["train"]["total_tokens"]
        elif (folder / "config.yaml").exists():
            yield load_config(folder / "config.yaml").train.total_tokens


def _closed(study: Study, arm: str) -> list[Record]:
    found = [read_results(study.folder / f"{arm}-seed{seed}") for seed in study.seeds]
    return [record for record in found if record is not None]


def is_closed(study: Study, run: Run) -> bool:
    """The run is trained, or diverged, and was measured as the study asks."""
    record = read_results(study.folder / run.name)
    return record is not None and record.measured == measured_settings(study)


def check_folders(study: Study, runs: Sequence[Run]) -> None:
    """Raises ValueError when a run folder holds a run of other settings than the study's."""
    problems = []
    for run in runs:
        folder = study.folder / run.name
        if (folder / "config.yaml").exists():
            there, place = load_config(folder / "config.yaml").to_dict(), folder / "config.yaml"
        elif (record := read_results(folder)) is not None:
            there, place = Config.model_validate(record.config).to_dict(), folder / "results.json"
        else:
            continue
        other = differences(there, run.config.to_dict(), ignoring=IGNORED)
        problems += [
            f"{place}: {key} is {old}, the study says {new}" for key, (old, new) in other.items()
        ]
    if problems:
        raise ValueError(
            "run folders of other settings; delete them, or give the study another run.name:\n  "
            + "\n  ".join(problems)
        )


def unpack(study: Study, records: Iterable[Record]) -> None:
    """Puts an archive's records into the study's folder where no result is."""
    for record in records:
        folder = study.folder / record.name
        if read_results(folder) is None:
            folder.mkdir(parents=True, exist_ok=True)
            write_results(folder, record)


def adopt(loaded: LoadedStudy, folders: Iterable[Path], say: Callable[[str], None] = print) -> None:
    """Measures finished ordinary runs that are runs of this study, by their settings, as its own.

    Raises:
        ValueError: a folder holds no finished run, or one whose settings are those of no run here.
    """
    study = loaded.study
    study.folder.mkdir(parents=True, exist_ok=True)
    freeze(loaded, len(records_of(loaded)))
    runs = expand(loaded, budgets_of(loaded))
    for folder in folders:
        there = load_config(folder / "config.yaml").to_dict()
        others = [
            differences(there, run.config.to_dict(), ignoring=(*IGNORED, "run.name"))
            for run in runs
        ]
        number = min(range(len(runs)), key=lambda n: len(others[n]))
        run, other = runs[number], others[number]
        if other:
            keys = ", ".join(f"{k} is {a} there, {b} here" for k, (a, b) in other.items())
            raise ValueError(
                f"{folder}: no run of this study has its settings; {run.name} has not: {keys}"
            )
        if not (checkpoints(folder / "checkpoints")):
            raise ValueError(f"{folder}: has no checkpoint; train it to its end first")
        if is_closed(study, run):
            say(f"{run.name}: has a result already; {folder} is not needed")
            continue
        (study.folder / run.name).mkdir(exist_ok=True)
        held = claim(study.folder / run.name)
        try:
            record = measure(study, run, folder, adopted_from=str(folder), forked_from=None)
            write_results(study.folder / run.name, record)
        finally:
            os.close(held)
        say(f"{run.name}: adopted from {folder}")


@dataclass(frozen=True)
class _Active:
    process: BaseProcess
    run: Run
    started: float
    slot: int  # number of the worker, and so of its device


class _Pool:
    """Works through runs, `jobs` at a time; a run waits for the one that it forks from."""

    def __init__(
        self, study: Study, runs: Sequence[Run], jobs: int, say: Callable[[str], None]
    ) -> None:
        self.study, self.runs, self.jobs, self.say = study, runs, jobs, say
        self.active: dict[Any, _Active] = {}

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
                timeout = POLL_S if waiting else None
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
        ready = [
            run
            for run in waiting
            if run.parent not in here
            and not (run.parent and is_claimed(self.study.folder / run.parent))
        ]
        return ready[: self.jobs - len(self.active)]

    def _start(self, run: Run) -> None:
        slot = min(set(range(self.jobs)) - {item.slot for item in self.active.values()})
        context: Any = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "fork")
        process = context.Process(target=work, args=(self.study, run, sys.argv), name=run.name)
        with _visible(device_of(slot, os.environ.get("CUDA_VISIBLE_DEVICES"), devices())):
            process.start()
        self.active[process.sentinel] = _Active(process, run, time.monotonic(), slot)

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


def devices() -> int:
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def device_of(slot: int, visible: str | None, count: int) -> str | None:
    """CUDA_VISIBLE_DEVICES of a worker: one of the devices that this program sees, in turn; None:
    leave it.

    visible: the variable as it is here. count: devices that torch sees.
    """
    if count == 0:
        return None
    names = visible.split(",") if visible else [str(number) for number in range(count)]
    return names[slot % count]


@contextmanager
def _visible(device: str | None) -> Iterator[None]:
    """For processes that are started inside: they see one device. This one has chosen its own
    before.
    """
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
