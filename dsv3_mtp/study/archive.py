"""What a run came to, as kept: results.json in its folder, one line of results.jsonl in an archive.

An archive is a folder with plan.json and results.jsonl. The report and its pictures are made from
these two files and from nothing else, so that a committed report can be rebuilt, checked and
continued without the run folders.
"""

import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from dsv3_mtp.config.reader import Problem, problems_of
from dsv3_mtp.config.section import Integer, Number, Section
from dsv3_mtp.files.atomic import write_text
from dsv3_mtp.files.checked import parse_json

RESULTS, ARCHIVE = "results.json", "results.jsonl"
Status = Literal["finished", "diverged"]


class Curve(Section):
    """One logged metric over training."""

    tokens: list[Integer]
    values: list[Number]

    def rules(self) -> Iterator[Problem]:
        if (n := len(self.tokens)) != len(self.values):
            yield "values", f"must be as many as tokens, {n} (got {len(self.values)})"

    @property
    def points(self) -> list[tuple[int, float]]:
        return list(zip(self.tokens, self.values, strict=True))


class Data(Section):
    """What a run trained or validated on."""

    path: str
    hash: str
    """Of the corpus's manifest, or of the task's settings."""


class Start(Section):
    """One start of the run: what it ran on."""

    time: str
    commit: str | None
    """null: not from a git checkout."""
    dirty: bool
    """There were uncommitted changes."""
    python: str
    versions: dict[str, str | None]
    device: str
    threads: Integer
    data: dict[str, Data]


class Fork(Section):
    run: str
    step: Integer


class RunRecord(Section):
    """One run of a study."""

    format: Literal[1] = 1
    arm: str
    seed: Integer
    status: Status
    error: str | None = None
    """Why it diverged."""
    config: dict[str, Any]
    """Every setting of the run."""
    measured: dict[str, Any]
    """The keys of the study file that say what is measured, as they were."""
    parameters: dict[Literal["training", "inference", "active"], Integer]
    flops_per_token: Number
    flops: Number
    tokens: Integer
    forked_from: Fork | None = None
    adopted_from: str | None = None
    """Folder of an ordinary run that was taken over."""
    seconds_per_token: Number | None = None
    """Of training."""
    metrics: dict[str, Number] = {}
    draw_sd: dict[str, Number] = {}
    """Metric -> standard deviation over the draws of this run."""
    solved_at: Integer | None = None
    """Tokens at which the task was solved; null: not within the budget, or not asked."""
    curves: dict[str, Curve] = {}
    starts: Annotated[list[Start], Field(min_length=1)]

    @property
    def name(self) -> str:
        return f"{self.arm}-seed{self.seed}"

    @property
    def finished(self) -> bool:
        return self.status == "finished"

    def line(self) -> str:
        """One line of JSON, without a newline."""
        return json.dumps(self.model_dump(mode="json"), ensure_ascii=False, allow_nan=False)


Table = Mapping[str, Mapping[int, RunRecord]]  # arm -> seed -> what the run came to


def parse_record(text: str, where: str, remedy: str) -> RunRecord:
    """One record. where, remedy: of the error. Raises ValueError: one sentence that names the
    place, what is wrong and what to do.
    """
    try:
        tree = parse_json(text, dict[str, Any])
        return RunRecord.model_validate(tree)
    except ValidationError as error:
        key, what = problems_of(error, tree, RunRecord)[0]
        more = f", and {error.error_count() - 1} more" if error.error_count() > 1 else ""
        cause = f"{key or 'the line'} {what}{more}"
    except ValueError as error:
        cause = f"not JSON: {error}"
    raise ValueError(f"{where}: damaged or of another version ({cause}); {remedy}")


def read_results(folder: Path) -> RunRecord | None:
    """results.json of a run folder; None: there is none. Raises ValueError: it is damaged."""
    path = folder / RESULTS
    if not path.exists():
        return None
    remedy = "delete this file, and it is measured again"
    return parse_record(path.read_text(encoding="utf-8", errors="replace"), str(path), remedy)


def write_results(folder: Path, record: RunRecord) -> None:
    write_text(folder / RESULTS, record.line() + "\n")


def write_archive(folder: Path, records: Iterable[RunRecord]) -> None:
    write_text(folder / ARCHIVE, "".join(record.line() + "\n" for record in records))


def read_archive(folder: Path, arms: Collection[str] | None = None) -> list[RunRecord]:
    """results.jsonl of an archive, of a study with these arms (None: any).

    Raises:
        ValueError: a line is damaged or of another study, or a run occurs twice. OSError: there is
            no such file.
    """
    path = folder / ARCHIVE
    records: dict[str, RunRecord] = {}
    text = path.read_text(encoding="utf-8", errors="replace")
    for number, line in enumerate(text.splitlines(), start=1):
        where = f"{path}, line {number}"
        remedy = "restore the line, or delete it and the run is repeated"
        record = parse_record(line, where, remedy)
        if arms is not None and record.arm not in arms:
            raise ValueError(f"{where}: {record.arm} is no arm of this study; {remedy}")
        if record.name in records:
            raise ValueError(f"{where}: {record.name} is there twice; delete one of the two lines")
        records[record.name] = record
    return list(records.values())


def table_of(arms: Iterable[str], seeds: Sequence[int], records: Iterable[RunRecord]) -> Table:
    """Records of these arms and seeds, in their order."""
    found = {(record.arm, record.seed): record for record in records}
    return {arm: {s: found[arm, s] for s in seeds if (arm, s) in found} for arm in arms}
