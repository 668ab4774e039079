"""The plan of a study, frozen at its first start: plan.json, with its hash and time.

A study file can be edited at any time. What it said when the first run started is kept, and every
later change with the number of runs that had finished by then: the report prints both.
"""

import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError, with_config
from typing_extensions import TypedDict

from dsv3_mtp.config import Config, code
from dsv3_mtp.config.reader import Problem, problems_of
from dsv3_mtp.config.resume import differences
from dsv3_mtp.config.section import Integer, Section
from dsv3_mtp.config.tree import read_tree
from dsv3_mtp.files.atomic import lock, write_json
from dsv3_mtp.files.checked import OPEN, parse_json
from dsv3_mtp.study.load import LoadedStudy, metric_problems, study_of

PLAN = "plan.json"
FREE = ("run", "scales")  # where the study lives, and how fast the machine is thought to be


class Change(Section):
    """One key of the study that was edited after the first start."""

    time: str
    finished: Integer
    """Runs that had finished by then."""
    key: str
    before: Any
    now: Any


@with_config(OPEN)
class Contents(TypedDict):
    """The study and its arms' configs."""

    study: dict[str, Any]
    configs: dict[str, dict[str, Any]]


class Plan(Section):
    """plan.json."""

    format: Literal[1] = 1
    frozen_at: str
    hash: str
    """SHA-256 of `frozen`."""
    frozen: Contents
    """At the first start."""
    current: Contents
    """As last used."""
    sets: list[str]
    """Overrides of the command line, as last used."""
    changes: list[Change] = []

    def late_seeds(self) -> list[int]:
        """Seeds that were added after the first start."""
        first = self.frozen["study"]["seeds"]
        return [seed for seed in self.current["study"]["seeds"] if seed not in first]


def freeze(loaded: LoadedStudy, finished: int) -> Plan:
    """The plan of the study's folder: written at the first call, then extended by what has changed.

    finished: runs that are finished now.

    Raises:
        ValueError: plan.json is damaged or was edited by hand.
    """
    folder, now = loaded.study.folder, contents(loaded)
    held = lock(folder / ".plan.lock", f"{folder}: waiting for another process's plan", wait=True)
    try:
        at = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        sets = list(loaded.sets)
        if not (folder / PLAN).exists():
            plan = Plan(frozen_at=at, hash=_hash(now), frozen=now, current=now, sets=sets)
        else:
            plan = read_plan(folder)
            changes = plan.changes + [
                Change(time=at, finished=finished, key=key, before=before, now=after)
                for key, (before, after) in _edited(plan.current, now).items()
            ]
            plan = plan.model_copy(update={"current": now, "sets": sets, "changes": changes})
        write_plan(folder, plan)
        return plan
    finally:
        os.close(held)


def contents(loaded: LoadedStudy) -> Contents:
    configs = {arm: config.to_dict() for arm, config in loaded.configs.items()}
    return {"study": loaded.study.model_dump(mode="json"), "configs": configs}


def write_plan(folder: Path, plan: Plan) -> None:
    write_json(folder / PLAN, plan.model_dump(mode="json"))


def read_plan(folder: Path) -> Plan:
    """plan.json of a study's folder or archive.

    Raises:
        ValueError: it is damaged, or what was frozen has been edited. OSError: there is none.
    """
    path = folder / PLAN
    try:
        tree = parse_json(path.read_bytes(), dict[str, Any])
        plan = Plan.model_validate(tree)
    except ValidationError as error:
        key, what = problems_of(error, tree, Plan)[0]
        raise ValueError(f"{path}: damaged: {key} {what}; restore the file") from None
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}; restore the file") from None
    if plan.hash != _hash(plan.frozen):
        raise ValueError(
            f"{path}: `frozen` has been edited after the first start; restore the file"
        )
    return plan


def load_archive(
    folder: Path, sets: tuple[str, ...] = (), *, trust_code: bool = False
) -> LoadedStudy:
    """The study that an archive is of, without its file.

    sets: overrides of run and seeds; others would make it another study. trust_code: import what
    its configs name as package.module:Class.

    Raises:
        ValueError: there is no plan.json, it is damaged, or an override is of another key.
    """
    path = folder / PLAN
    if not path.is_file():
        raise ValueError(
            f"{folder}: no archive of a study there ({PLAN} is missing); name a folder that "
            "--report-only --out has written"
        )
    plan = read_plan(folder)
    for item in sets:
        if item.partition("=")[0].partition(".")[0] not in ("run", "seeds"):
            raise ValueError(f"--set {item}: with --from only run.* and seeds can be set")
    content, problems = plan.current["study"], list[Problem]()
    if sets:
        tree, problems = read_tree(path, [f"current.study.{item}" for item in sets])
        content = tree["current"]["study"]
    study = study_of(content, source=str(path), problems=problems)
    configs = {}
    for arm, config in plan.current["configs"].items():
        if isinstance(config.get("run"), dict):
            config["run"]["dir"] = str(study.folder)
        if not trust_code:
            code.refuse(f"{path}: configs.{arm}", config, ())
        try:
            configs[arm] = Config.model_validate(config)
        except ValidationError as error:
            key, what = problems_of(error, config, Config)[0]
            raise ValueError(
                f"{path}: configs.{arm}: {key} {what}; the archive is of another version of this "
                "program: read it with the commit that its report names"
            ) from None
    if missing := sorted(study.arms.keys() - configs.keys()):
        raise ValueError(
            f"{path}: damaged: current.configs has none of {', '.join(missing)}; restore the file"
        )
    for place, text in metric_problems(study, configs):
        raise ValueError(f"{path}: current.study.{place}: {text}")
    return LoadedStudy(study, tuple(plan.sets), configs)


def _edited(before: Contents, now: Contents) -> dict[str, tuple[Any, Any]]:
    """Key -> (before, now) of all that differs. A setting new in this version is no edit."""
    study = differences(before["study"], now["study"], ignoring=FREE)
    for arm, config in now["configs"].items():
        if arm in before["configs"]:
            old = _of_this_version(before["configs"][arm], code.named(config))
            changed = differences(old, config, ignoring=("run",)).items()
            study |= {f"configs.{arm}.{key}": values for key, values in changed}
    return study


def _of_this_version(config: dict[str, Any], trusted: list[str]) -> dict[str, Any]:
    """With the defaults of this version. trusted: the code that the study's own file names."""
    if not set(code.named(config)) <= set(trusted):
        return config
    try:
        return Config.model_validate(config).to_dict()
    except ValidationError:
        return config


def _hash(tree: Contents) -> str:
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()
