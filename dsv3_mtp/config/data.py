"""The `data` section: prepared text, or a generated task whose right answers are known.

What a task is asked is in task.py; the tasks are in dsv3_mtp/tasks, a file each.
"""

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, SerializeAsAny, Tag

from dsv3_mtp.config.reader import Problem, show
from dsv3_mtp.config.section import Boolean, FilePath, Integer, OnResume, Positive, Section
from dsv3_mtp.config.source import SOURCES, SourceSection
from dsv3_mtp.config.task import TASKS, Task


def _path_or_source(value: Any) -> Any:
    if isinstance(value, str | Section) or (isinstance(value, Mapping) and "type" in value):
        return value
    raise ValueError("must be a path, or a source with a type")


OneSource = Annotated[
    Annotated[FilePath, Tag("<path>")]
    | Annotated[SerializeAsAny[SourceSection], BeforeValidator(SOURCES.section), Tag("<source>")],
    Discriminator(lambda value: "<path>" if isinstance(value, str) else "<source>"),
    BeforeValidator(_path_or_source),
]


class DataEntry(Section):
    """One corpus of a mixture."""

    path: OneSource
    """Prepared folder, Megatron prefix, or a source with a type."""
    weight: Positive
    """Relative share of the sampled sequences."""


OneOrMany = Annotated[
    Annotated[OneSource, Tag("<one>")] | Annotated[tuple[DataEntry, ...], Tag("<many>")],
    Discriminator(lambda value: "<many>" if isinstance(value, list | tuple) else "<one>"),
]


class DataConfig(Section):
    """Where tokens come from: text, with documents packed (V3 4.1), or a generated task."""

    on_resume = OnResume.RECORDED

    train: OneOrMany | None = None
    """Prepared folder, Megatron prefix (PREFIX.bin, PREFIX.idx), a source {type:
    package.module:Class}, or a list of {path, weight}; null with a task.
    """
    val: OneSource | None = None
    """Prepared folder (its validation split), Megatron prefix or a source; null with a task."""
    task: Annotated[
        Annotated[SerializeAsAny[Task], BeforeValidator(TASKS.section)] | None, OnResume.FIXED
    ] = None
    """Generated examples with known answers instead of text; null: text."""
    build: Annotated[Literal["pystdlib", "sitelib"] | None, OnResume.FREE] = None
    """Corpus to build into the folder `train` when it is missing and has the corpus in its name:
    the standard library of the running interpreter, or that and all of its site-packages
    (data/sitelib.py).
    """
    seq_len: Annotated[Integer, Field(ge=2, le=2**26), OnResume.FIXED]
    """Positions per sequence, T (V3 4.2: 4096). A sample holds T + 1 + D tokens."""
    mask: Literal["none", "prompts"] = "none"
    """What is no target. prompts: all but the answers, in data prepared with --mask prompts."""
    mask_documents: Annotated[Boolean, OnResume.FIXED] = False
    """Mask attention, targets and MTP inputs across document boundaries (V3 4.1: not done)."""

    @property
    def entries(self) -> tuple[DataEntry, ...]:
        """`train` as a mixture: a single corpus is one entry of weight 1; none with a task."""
        if isinstance(self.train, str | SourceSection):
            return (DataEntry(path=self.train, weight=1.0),)
        return self.train or ()

    @property
    def paths(self) -> list[str]:
        """Of the training corpora that are folders or Megatron files."""
        return [entry.path for entry in self.entries if isinstance(entry.path, str)]

    def rules(self) -> Iterator[Problem]:
        if self.task is not None:
            yield from self._task_rules(self.task)
            return
        for key in ("train", "val"):
            if getattr(self, key) is None:
                yield key, "missing; name prepared data here, or set data.task"
        if self.train == ():
            yield "train", "must name at least one corpus (got [])"
        if self.build is not None and isinstance(self.train, tuple | SourceSection):
            text = "needs one folder in data.train, not a list; set null"
            yield "build", f"{text} (got {show(self.build)})"

    def _task_rules(self, task: Task) -> Iterator[Problem]:
        if self.mask != "none":
            yield "mask", f"must be none: data.task knows its answers itself (got {self.mask})"
        for key in ("train", "val", "build"):
            if (value := getattr(self, key)) is not None:
                yield key, f"must be null: data.task generates the data (got {show(value)})"
        length = task.example_length
        if self.seq_len < length - 1:
            why = f"an example of {task.type} has {length} tokens, the last is only a target"
            yield "seq_len", f"must be >= {length - 1}: {why} (got {self.seq_len})"
        elif task.has_answers and self.seq_len + 1 >= 2 * length and not self.mask_documents:
            why = f"seq_len = {self.seq_len} packs several examples, and none may see another"
            remedy = f"or set data.seq_len to {length - 1} for one (got false)"
            yield "mask_documents", f"must be true: {why}; {remedy}"
