"""Reads a study file and checks it with every arm's config.

loaded = load_study("configs/studies/lambda.yaml", ["seeds=[1, 2]"])
loaded.study.arms, loaded.configs["v3_step"].mtp.loss_weight
"""

import functools
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dsv3_mtp.config import Config, ConfigError, layout, load_config
from dsv3_mtp.config.reader import Problem, problems_of
from dsv3_mtp.config.tree import read_tree
from dsv3_mtp.study.matrix import Overrides, Study
from dsv3_mtp.study.metric_names import OWN, not_measured


@dataclass(frozen=True)
class LoadedStudy:
    """A valid study and the config of each arm, for the first seed, before budgets are matched."""

    study: Study
    sets: tuple[str, ...]
    configs: dict[str, Config]


def load_study(path: str | Path, sets: Iterable[str] = ()) -> LoadedStudy:
    """Reads and checks a study file and every arm's config.

    sets: overrides of the file ("scale=gpu"), or of the run that all arms start from
    ("optim.lr=1e-3").

    Raises:
        ConfigError: every problem of the study and of its arms.
    """
    path, sets = Path(path), tuple(sets)
    # of a run, that are not keys of a study file too
    sections = set(Config.model_fields) - set(Study.model_fields)
    of_runs = [item for item in sets if item.partition("=")[0].partition(".")[0] in sections]
    tree, problems = read_tree(path, [item for item in sets if item not in of_runs])
    study = study_of(tree, source=str(path), problems=problems)
    found: dict[Problem, list[str]] = {}
    configs, base = {}, path.parent / study.scales[study.scale].base
    read_tree(base)  # a base that cannot be read is no problem of the arms
    for name in study.arms:
        try:
            configs[name] = load_config(base, _settings(study, name, of_runs))
            refused = list(layout.problems(configs[name], world_size=study.ranks))
        except ConfigError as error:
            refused = list(error.problems)
        for problem in refused:
            found.setdefault(problem, []).append(name)
    problems += metric_problems(study, configs)
    problems += _measuring_problems(study, configs)
    for (key, text), arms in found.items():
        where = "every arm" if len(arms) == len(study.arms) else f"arms.{', '.join(arms)}"
        problems.append((f"{where}: {key}", text))
    if problems:
        raise ConfigError(str(path), problems)
    return LoadedStudy(study, sets, configs)


def study_of(tree: dict[str, Any], *, source: str, problems: list[Problem]) -> Study:
    """The study of a file's tree, with the arms of its grid and with patterns of arms spelled out.
    Raises ConfigError: with `problems` and every one of the tree.
    """
    _spell_out(tree)
    try:
        return Study.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(source, problems + problems_of(error, tree, Study)) from None


def _spell_out(tree: dict[str, Any]) -> None:
    """Adds the grid's arms, puts names for patterns; a wrong shape is left to the schema."""
    grid, arms = tree.get("grid"), tree.setdefault("arms", {})
    if isinstance(grid, dict) and isinstance(arms, dict):
        arms |= {name: arm for name, arm in _grid_arms(grid) if name not in arms}
    comparisons = tree.get("comparisons")
    for item in comparisons.values() if isinstance(comparisons, dict) else ():
        if isinstance(item, dict) and isinstance(item.get("arms"), list):
            names: dict[Any, None] = {}
            others = [arm for arm in arms if arm != item.get("against")]
            for pattern in item["arms"]:
                fitting = [arm for arm in others if fnmatchcase(arm, str(pattern))]
                names |= dict.fromkeys(fitting if "*" in str(pattern) and fitting else [pattern])
            if any("*" in str(pattern) for pattern in item["arms"]):
                item["arms"] = list(names)


def _grid_arms(grid: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    axes = grid.get("axes")
    choices: list[list[tuple[str, str, Any]]] = []  # per axis: part of the name, key, value
    for label, axis in axes.items() if isinstance(axes, dict) else ():
        values = axis.get("values") if isinstance(axis, dict) else None
        if not isinstance(values, list | dict):
            return
        given = values.values() if isinstance(values, dict) else values
        parts = zip(axis_names(label, values), given, strict=True)
        choices.append([(name, axis.get("key"), value) for name, value in parts])
    about, common = grid.get("about", "of the grid"), grid.get("set", {})
    for chosen in itertools.product(*choices) if choices else ():
        settings = {**common, **{key: value for _, key, value in chosen}}
        yield "_".join(part for part, _, _ in chosen), {"about": about, "set": settings}


def axis_names(label: str, values: list[Any] | dict[str, Any]) -> list[str]:
    """What an axis of a grid adds to the names of arms, one for each of its values."""
    if isinstance(values, dict):
        return [str(name) for name in values]
    return [f"{label}{value}" for value in values]


def metric_problems(study: Study, configs: Mapping[str, Config]) -> Iterator[Problem]:
    """Metrics that could be of heads, objectives or tasks of one's own, and are of no arm's. An arm
    that is refused may have them.
    """
    for place, metric in study.asked() if len(configs) == len(study.arms) else ():
        if OWN.fullmatch(metric) and (text := not_measured(metric, configs.values())):
            yield place, text


def _measuring_problems(study: Study, configs: Mapping[str, Config]) -> Iterator[Problem]:
    """What the study asks to be measured, and runs of these configs could not be."""
    ramps = [name for name, config in configs.items() if config.train.batch_size_ramp is not None]
    if study.ranks > 1 and ramps:
        text = f"rounds to other batches on {study.ranks} ranks (scales.{study.scale}.ranks) than"
        remedy = "on one, so budgets would not be matched; set null"
        yield f"arms.{', '.join(ramps)}: train.batch_size_ramp", f"{text} {remedy}"
    coarse = [name for name, config in configs.items() if config.log.every > 1]
    if study.loss_error_against is not None and coarse:
        text = "must be 1 with loss_error_against: it is smoothed by step"
        yield f"arms.{', '.join(coarse)}: log.every", text
    tasks = {name: config.data.task for name, config in configs.items()}
    texts = [name for name, task in tasks.items() if task is None or not task.has_answers]
    if study.solve_threshold is not None and texts:
        text = f"needs a data.task with answers, which arms.{', '.join(texts)} have not; set null"
        yield "solve_threshold", text
    if study.acceptance is not None:
        needed = study.acceptance.prefix_tokens + study.acceptance.new_tokens
        for name in texts:
            longest = configs[name].model.max_position_embeddings
            if configs[name].mtp.depths and needed > longest:
                bound = f"model.max_position_embeddings = {longest} of arms.{name}"
                text = f"prefix_tokens + new_tokens must be <= {bound} (got {needed})"
                yield "acceptance", text


def _settings(study: Study, name: str, of_runs: Iterable[str]) -> list[str]:
    """What load_config is to override in the base for an arm's first seed: later ones win."""

    def items(overrides: Overrides) -> list[str]:
        # default: a date, which no key takes, is refused as text
        dump = functools.partial(json.dumps, ensure_ascii=False, default=str)
        return [f"{key}={dump(value)}" for key, value in overrides.items()]

    seed = study.seeds[0]
    own = {"run.name": f"{name}-seed{seed}", "run.dir": str(study.folder), "run.seed": seed}
    common = [*items(study.scales[study.scale].set), *items(study.set)]
    return [*common, *of_runs, *items(study.arms[name].set | own)]
