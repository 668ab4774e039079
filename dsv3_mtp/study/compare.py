"""Ordinary finished runs side by side: their settings, their final metrics, their curves.

Runs whose settings differ in run.seed alone are seeds of one arm. What was not planned beforehand
proves nothing: no p value is printed.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from dsv3_mtp.config import Config, load_config
from dsv3_mtp.config.resume import differences, flat
from dsv3_mtp.data.ngrams import ORDERS, early_training
from dsv3_mtp.files.atomic import folder_for, write_text
from dsv3_mtp.report.progress import columns, quantity
from dsv3_mtp.study import hover, page, tables
from dsv3_mtp.study.archive import RunRecord, Table, table_of
from dsv3_mtp.study.expand import Run
from dsv3_mtp.study.findings import LOSS, effects_of
from dsv3_mtp.study.folder import IGNORED
from dsv3_mtp.study.matrix import Study
from dsv3_mtp.study.measure import measure
from dsv3_mtp.study.page import Element, Heading, Paragraph, Picture, Rows
from dsv3_mtp.study.pictures import draw_all
from dsv3_mtp.study.pictures.base import PictureData

FLOORS = tuple(f"val/floor/{order}" for order in ORDERS)
FREE = (*IGNORED, "run.name", "run.seed")


def compare(folders: Sequence[Path], out: Path, *, trust_code: bool = False) -> tuple[str, Path]:
    """Compares run folders with the first of them; returns (a table for the terminal, the page).
    Raises ValueError: fewer than two runs, a folder is no run, or one has not been validated.
    """
    if len(folders) < 2:
        raise ValueError("give two runs or more")
    configs = {f: load_config(f / "config.yaml", trust_code=trust_code) for f in folders}
    arms = _arms(configs)
    study = _study(arms, [config.run.seed for config in configs.values()])
    runs = [(arm, folder) for arm, members in arms.items() for folder in members]
    records = [_record(study, arm, configs[folder], folder) for arm, folder in runs]
    if len(set(folders)) < len(folders) or len({r.name for r in records}) < len(records):
        text = "two of these runs have the same settings and the same run.seed: one is enough"
        raise ValueError(text)
    study = study.model_copy(update={"metrics": _metrics(records)})
    by_arm = {arm: configs[members[0]] for arm, members in arms.items()}
    table = table_of(study.arms, study.seeds, records)
    data = PictureData(study, by_arm, table, effects_of(study, table))
    warnings = _warnings([configs[folder] for _, folder in runs], records)
    folder_for(out)
    planned = ("answer.png", "effects.png")
    pictures = [Picture(*item) for item in draw_all(data, out) if item[0] not in planned]
    blocks: list[Element] = [
        Heading("Runs side by side", 1),
        Paragraph("Not planned beforehand: differences here are for looking, not for claims."),
        *map(Paragraph, warnings),
        Rows(*_settings(by_arm)),
        *tables.result_table(study, table),
        *pictures,
    ]
    write_text(out / "compare.md", page.to_markdown(blocks))
    html = page.to_html(blocks, hover.live(data), title="Runs side by side", folder=out)
    write_text(out / "compare.html", html)
    return "\n".join([*warnings, _text(study, table)]), out / "compare.html"


def _arms(configs: dict[Path, Config]) -> dict[str, list[Path]]:
    """Name -> folders that differ in the seed alone; named after the first of them."""
    arms: dict[str, list[Path]] = {}
    for folder, config in configs.items():
        for members in arms.values():
            if not differences(configs[members[0]].to_dict(), config.to_dict(), ignoring=FREE):
                members.append(folder)
                break
        else:
            name = _arm_name(config.run.name)
            name = _arm_name(folder.as_posix()) if name in arms else name
            arms[name] = [folder]
    return arms


def _study(arms: Iterable[str], seeds: Sequence[int]) -> Study:
    first, *others = arms
    if not others:
        raise ValueError("these runs differ in their seeds only: there is nothing to compare")
    tree: dict[str, Any] = {
        "run": {"name": "compare"},
        "question": "-",
        "expectation": "-",
        "scales": {"cpu": {"base": "-", "flops_per_s": 1.0}},
        "seeds": sorted(set(seeds)),
        "arms": {name: {"about": name} for name in (first, *others)},
        "comparisons": {"runs": {"against": first, "arms": others, "rule": "same model"}},
        "primary": {"metric": LOSS, "comparison": "runs", "margin": 1e-9},
    }
    return Study.model_validate(tree)


def _arm_name(name: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "._" else "_" for letter in name)


def _record(study: Study, arm: str, config: Config, folder: Path) -> RunRecord:
    try:
        return measure(study, Run(arm, config.run.seed, config), folder, from_log=True)
    except IndexError:
        raise ValueError(f"{folder}: has not been validated yet") from None


def _metrics(records: Sequence[RunRecord]) -> tuple[str, ...]:
    """What every run, or every run with heads, was validated on, the main loss first."""
    found = dict.fromkeys(key for record in records for key in record.metrics)
    return tuple(key for key in found if key != LOSS and _is_read(key))


def _is_read(key: str) -> bool:
    """Of the floors those of the main loss, not the many of the drafters."""
    return key in FLOORS or not key.startswith("val/floor/")


def _warnings(configs: Sequence[Config], records: Sequence[RunRecord]) -> list[str]:
    """What a reader is to know before the figures are compared."""
    names = [config.run.name for config in configs]
    if len(set(names)) < len(names):
        names = [record.name for record in records]
    early = [(name, early_training(r.metrics)) for name, r in zip(names, records, strict=True)]
    lines = [f"{name}: {text}" for name, text in early if text]
    budgets = [_budget(*pair) for pair in zip(configs, records, strict=True)]
    if len(set(budgets)) > 1:
        short = [quantity(budget) for budget in budgets]
        exact = len(set(short)) < len(set(budgets))  # 5000 and 5100 would both be 5k
        shown = [str(budget) for budget in budgets] if exact else short
        each = ", ".join(f"{name} {b}" for name, b in zip(names, shown, strict=True))
        lines.append(f"budgets differ: {each} tokens")
    depths = [config.mtp.depths for config in configs]
    if len(set(depths) - {0}) > 1:  # a run without heads has no tokens per step
        each = ", ".join(f"{name} {d}" for name, d in zip(names, depths, strict=True))
        lines.append(f"D differs: tokens per step are not to be ranked ({each})")
    return lines


def _budget(config: Config, record: RunRecord) -> int:
    """Tokens before the validation that is compared: fewer than planned in a run that stopped."""
    curve = record.curves.get(LOSS)
    total = config.train.total_tokens
    return total if curve is None else min(total, int(curve.tokens[-1]))


def _settings(configs: dict[str, Config]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the settings in which the runs differ."""
    trees = [config.to_dict() for config in configs.values()]
    found = [differences(trees[0], tree, ignoring=FREE) for tree in trees]
    settings = [dict(flat(tree)) for tree in trees]
    keys = dict.fromkeys(key for changed in found for key in changed)
    return ["setting", *configs], [[key, *(str(s.get(key)) for s in settings)] for key in keys]


def _text(study: Study, table: Table) -> str:
    rows = [["metric", *study.arms]]
    for metric in (LOSS, *study.metrics):
        rows.append([metric, *(tables.interval_cell(table, arm, metric) for arm in study.arms)])
    return "\n".join(columns(rows))
