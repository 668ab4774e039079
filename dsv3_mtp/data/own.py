"""A data source of a file of one's own (docs/extend.md), with a look at each row that it makes:
what is wrong with one would else be an index error in the middle of a step, or be trained on.
"""

from typing import Any

import numpy as np

from dsv3_mtp.config.reader import show
from dsv3_mtp.config.source import SourceSection
from dsv3_mtp.data.source import DataSource


class OwnSource:
    """What `section.open(split)` gives, for a model with ids below `vocab_size`.

    Raises:
        ValueError: it is no `DataSource`; at the first row, a wrong one.
    """

    def __init__(self, section: SourceSection, split: str, vocab_size: int):
        self.source, self.type, self.ids = section.open(split), section.type, vocab_size
        members = [name for name in vars(DataSource) if not name.startswith("_")]
        lacking = [name for name in members if not hasattr(self.source, name)]
        if lacking:
            raise ValueError(
                f"{self.type}: what open({split!r}) gives, a {type(self.source).__name__}, has no "
                f"{', '.join(lacking)}, which dsv3_mtp.data.source.DataSource asks for"
            )

    def __getattr__(self, name: str) -> Any:
        return getattr(self.source, name)

    def id_range(self) -> tuple[int, int]:
        found = self.source.id_range()
        if not isinstance(found, tuple) or len(found) != 2:
            raise ValueError(f"{self.type}: id_range() must give two ids (got {show(found)})")
        return found

    def stream(self, seq_len: int, key: tuple[int, int] | None) -> "OwnStream":
        return OwnStream(self.source.stream(seq_len, key), self.type, self.ids)


class OwnStream:
    """A stream whose rows are what `Stream` says."""

    def __init__(self, stream: Any, name: str, vocab_size: int):
        self.rows, self.name, self.ids, self.repeated = stream, name, vocab_size, False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.rows, name)

    def sample(self, index: int, length: int) -> tuple[np.ndarray, ...]:
        row = self._checked(self.rows.sample(index, length), index, length)
        if not self.repeated:
            again = self._checked(self.rows.sample(index, length), index, length)
            if not all(np.array_equal(a, b) for a, b in zip(row, again, strict=True)):
                why = "a row must depend on its index alone, or no run could be resumed"
                raise ValueError(f"{self.name}: row {index} is another at the second look: {why}")
            self.repeated = True
        return row

    def spread(self, index: int, count: int, length: int) -> tuple[np.ndarray, ...]:
        return self._checked(self.rows.spread(index, count, length), index, length)

    def _checked(self, row: Any, index: int, length: int) -> tuple[np.ndarray, ...]:
        kinds = ("tokens", "iu"), ("documents", "iu"), ("targets", "b")
        wrong = None
        if not isinstance(row, tuple) or len(row) not in (2, 3):
            wrong = f"{show(row)}, not (tokens, documents) or (tokens, documents, targets)"
        else:
            for part, (name, kind) in zip(row, kinds, strict=False):
                if not isinstance(part, np.ndarray) or part.shape != (length,):
                    shape = getattr(part, "shape", type(part).__name__)
                    wrong = wrong or f"{name} of shape {shape}, not ({length},)"
                elif part.dtype.kind not in kind:
                    wrong = wrong or f"{name} of {part.dtype}"
        if wrong is None and not (row[0].min() >= 0 and row[0].max() < self.ids):
            bound = f"model.vocab_size = {self.ids}"
            wrong = f"ids {row[0].min()}..{row[0].max()}, where {bound}"
        if wrong is not None:
            raise ValueError(f"{self.name}: row {index} has {wrong}")
        return row
