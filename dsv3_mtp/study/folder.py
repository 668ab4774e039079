"""What stands in a study's folder: its runs' records, what they fix, and where they come from."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from statistics import fmean

from dsv3_mtp.config import Config, code, load_config
from dsv3_mtp.config.resume import FREE, differences
from dsv3_mtp.config.tree import read_tree
from dsv3_mtp.files.run_folder import checkpoints
from dsv3_mtp.study.archive import RunRecord, read_archive, read_results, write_results
from dsv3_mtp.study.expand import Run, expand, whole_steps
from dsv3_mtp.study.load import LoadedStudy
from dsv3_mtp.study.matrix import Study
from dsv3_mtp.study.measure import measure, measured_settings
from dsv3_mtp.study.plan import PLAN, freeze, load_archive, read_plan, write_plan
from dsv3_mtp.study.worker import claim

# Of a run that is there: settings that change neither what is learned nor what is measured.
IGNORED = tuple(k for k in FREE if k not in ("eval.batches", "train.micro_batch_size"))


def record_of(study: Study, name: str) -> RunRecord | None:
    """What stands in the folder of a run, if it was measured as the study asks."""
    record = read_results(study.folder / name)
    return record if record and record.measured == measured_settings(study) else None


def records_of(loaded: LoadedStudy) -> list[RunRecord]:
    """Those of the study's arms and seeds that there are."""
    study = loaded.study
    names = (f"{arm}-seed{seed}" for seed in study.seeds for arm in study.arms)
    return [record for name in names if (record := record_of(study, name)) is not None]


def budgets_of(loaded: LoadedStudy) -> dict[str, int]:
    """total_tokens of the arms with another's measured time, of their own runs or by measurement.

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
            tokens = seconds / fmean(pace for pace, _ in paces[1])
            found[name] = whole_steps(loaded.configs[name], tokens)
    return found


def _budgets_begun(study: Study, arm: str) -> Iterator[int]:
    for seed in study.seeds:
        folder = study.folder / f"{arm}-seed{seed}"
        record = read_results(folder)
        if record is not None:
            yield record.config["train"]["total_tokens"]
        elif (folder / "config.yaml").exists():
            tree, _ = read_tree(folder / "config.yaml")
            yield tree["train"]["total_tokens"]


def _closed(study: Study, arm: str) -> list[RunRecord]:
    found = [read_results(study.folder / f"{arm}-seed{seed}") for seed in study.seeds]
    return [record for record in found if record is not None]


def is_closed(study: Study, run: Run) -> bool:
    """The run is trained, or diverged, and was measured as the study asks."""
    return record_of(study, run.name) is not None


def check_folders(study: Study, runs: Sequence[Run]) -> None:
    """Raises ValueError when a run folder holds a run of other settings than the study's."""
    problems = []
    for run in runs:
        folder, own = study.folder / run.name, code.named(run.config.to_dict())
        if (folder / "config.yaml").exists():
            place = folder / "config.yaml"
            there = load_config(place, trust_code=own).to_dict()
        elif (record := read_results(folder)) is not None:
            place = folder / "results.json"
            code.refuse(str(place), record.config, own)
            there = Config.model_validate(record.config).to_dict()
        else:
            continue
        other = differences(there, run.config.to_dict(), ignoring=IGNORED).items()
        problems += [f"{place}: {key} is {old}, the study says {new}" for key, (old, new) in other]
    if problems:
        text = "run folders of other settings; delete them, or give the study another run.name:"
        raise ValueError("\n  ".join([text, *problems]))


def report_study(loaded: LoadedStudy, out: Path | None = None) -> Path:
    """The report on what has been run, into `out` or the study's folder; returns report.md.

    Raises:
        ValueError: nothing has been run, a run folder holds a run of other settings, or a
            results.json or the plan is damaged.
    """
    # not above: matplotlib, which training does not need
    from dsv3_mtp.study.report import require_runs, write_report

    study = loaded.study
    check_folders(study, expand(loaded, budgets_of(loaded)))
    records = records_of(loaded)
    require_runs(study, records, out or study.folder)
    study.folder.mkdir(parents=True, exist_ok=True)
    return write_report(loaded, freeze(loaded, len(records)), records, out or study.folder)


def load_archived(
    folder: Path, sets: tuple[str, ...] = (), *, trust_code: bool = False
) -> LoadedStudy:
    """The study of an archive, with its records and plan in the study's folder, to go on with it.
    Raises ValueError: the archive is damaged, or the folder has a plan of its own.
    """
    loaded, plan = load_archive(folder, sets, trust_code=trust_code), read_plan(folder)
    target = loaded.study.folder
    target.mkdir(parents=True, exist_ok=True)
    if (target / PLAN).exists() and read_plan(target).hash != plan.hash:
        raise ValueError(f"{target}: holds another study; give it --set run.name=NAME")
    if not (target / PLAN).exists():
        write_plan(target, plan)
    unpack(loaded.study, read_archive(folder, loaded.study.arms))
    return loaded


def unpack(study: Study, records: Iterable[RunRecord]) -> None:
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
    runs = expand(loaded, budgets_of(loaded))
    for folder in folders:
        own = [name for run in runs for name in code.named(run.config.to_dict())]
        there = load_config(folder / "config.yaml", trust_code=own).to_dict()
        free = (*IGNORED, "run.name")
        others = [differences(there, run.config.to_dict(), ignoring=free) for run in runs]
        number = min(range(len(runs)), key=lambda n: len(others[n]))
        run, other = runs[number], others[number]
        if other:
            keys = ", ".join(f"{k} is {a} there, {b} here" for k, (a, b) in other.items())
            raise ValueError(
                f"{folder}: no run of this study has its settings; {run.name} has not: {keys}"
            )
        if not checkpoints(folder / "checkpoints"):
            raise ValueError(f"{folder}: has no checkpoint; train it to its end first")
        if is_closed(study, run):
            say(f"{run.name}: has a result already; {folder} is not needed")
            continue
        (study.folder / run.name).mkdir(parents=True, exist_ok=True)
        freeze(loaded, len(records_of(loaded)))
        held = claim(study.folder / run.name)
        try:
            record = measure(study, run, folder, adopted_from=str(folder), forked_from=None)
            write_results(study.folder / run.name, record)
        finally:
            os.close(held)
        say(f"{run.name}: adopted from {folder}")
