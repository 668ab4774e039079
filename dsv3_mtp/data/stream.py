"""The windows of tokenised documents: a row of T + lookahead tokens for every index.

Per source, epoch e is a seeded permutation of the documents, and the epochs run on as one endless
token stream. Window w covers stream[w * T : w * T + T + lookahead]; the inputs of consecutive
windows touch and never overlap, so that each token is a main input once per epoch and (the stream's
very first token apart) a main target once per epoch. The windows that start in an epoch are visited
in a second permutation, so that a batch is not one file. Reading sample j of a source needs no
history.
"""

import functools
from collections.abc import Sequence
from typing import Protocol

import numpy as np

DOCUMENTS, WINDOWS = 0, 1  # which of the two permutations of an epoch


class Documents(Protocol):
    """N tokens in documents, read by position."""

    @property
    def document_starts(self) -> np.ndarray:
        """(documents + 1,) int64, in tokens."""

    @property
    def tokens(self) -> int: ...

    @property
    def masks(self) -> Sequence[np.ndarray] | None:
        """None: every token is a target."""

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) as int64."""

    def read_scored(self, start: int, stop: int) -> np.ndarray:
        """Which of the tokens [start, stop) are targets, bool."""


class DocumentStream:
    """The endless token stream of one source: all its documents, epoch after epoch.

    key: (seed, number of the source), or None for the natural order in every epoch.
    """

    def __init__(self, source: Documents, seq_len: int, key: tuple[int, int] | None) -> None:
        self.source, self.seq_len, self.key = source, seq_len, key
        self.lengths = np.diff(source.document_starts)
        # A window touches its epoch and the next, and a batch may lie on both sides of an epoch
        # border.
        self._documents = functools.lru_cache(maxsize=3)(self._document_order)
        self._windows = functools.lru_cache(maxsize=2)(self._window_order)

    def sample(self, index: int, length: int) -> tuple[np.ndarray, ...]:
        """Sample `index` >= 0 of the source: (tokens (length,), documents (length,))."""
        epoch = index * self.seq_len // self.source.tokens
        first = self._first_window(epoch)
        window = first + int(self._windows(epoch)[index - first])
        return self.span(window * self.seq_len, length)

    def spread(self, index: int, count: int, length: int) -> tuple[np.ndarray, ...]:
        """Window `index` of `count` that are evenly spread over the source."""
        return self.span(self.place(index, count) * self.seq_len, length)

    def place(self, index: int, count: int) -> int:
        return index * self.available // count

    @property
    def available(self) -> int:
        """Windows of the natural order that have all of their targets, and at least one."""
        return max((self.source.tokens - 1) // self.seq_len, 1)

    @property
    def windows(self) -> int:
        """Windows that start in the first epoch."""
        return self._first_window(1)

    def span(self, start: int, length: int) -> tuple[np.ndarray, ...]:
        """stream[start : start + length], the document number of each token, from 0, and where not
        every token is a target whether it is one.
        """
        masked, scored = self.source.masks is not None, np.empty(length, np.bool_)
        tokens, documents = np.empty(length, np.int64), np.empty(length, np.int64)
        filled = number = 0
        while filled < length:
            epoch, offset = divmod(start + filled, self.source.tokens)
            order, ends = self._documents(epoch)
            slot = int(np.searchsorted(ends, offset, side="right"))
            stop = min(int(ends[slot]) - offset, length - filled) + filled
            begin = int(self.source.document_starts[order[slot] + 1]) - (int(ends[slot]) - offset)
            tokens[filled:stop] = self.source.read(begin, begin + stop - filled)
            documents[filled:stop] = number
            if masked:
                scored[filled:stop] = self.source.read_scored(begin, begin + stop - filled)
            filled, number = stop, number + 1
        return (tokens, documents, scored) if masked else (tokens, documents)

    def _first_window(self, epoch: int) -> int:
        return -(-epoch * self.source.tokens // self.seq_len)

    def _document_order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(documents in the order of this epoch, token offset at which each of them ends)."""
        order = self._permutation(epoch, DOCUMENTS, len(self.lengths))
        return order, np.cumsum(self.lengths[order])

    def _window_order(self, epoch: int) -> np.ndarray:
        return self._permutation(
            epoch, WINDOWS, self._first_window(epoch + 1) - self._first_window(epoch)
        )

    def _permutation(self, epoch: int, kind: int, n: int) -> np.ndarray:
        if self.key is None:
            return np.arange(n)
        # numpy fixes the raw output of a generator for ever, but not what Generator.permutation
        # makes of it.
        generator = np.random.PCG64(np.random.SeedSequence([*self.key, epoch, kind]))
        return np.argsort(generator.random_raw(n), kind="stable")
