"""Endless batches of T + lookahead tokens from sources: resumable, the same for any ranks.

Row j of a source needs no history (config/task.py: Stream): a sampler's state is a few integers.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dsv3_mtp.data.source import DataSource, Source

# tokens and documents (b, T + lookahead) int64; of a task, and of text with masked prompts, also
# (b, T + lookahead) bool: which tokens are targets
RowBatch = tuple[np.ndarray, ...]


class Sampler:
    """An infinite stream of global batches, the same for every number of ranks.

    seq_len    T, main inputs per sample
    lookahead  1 + D: the tokens after the T inputs that targets and MTP inputs need
    weights    share of the samples per source (any positive numbers; None: equal shares)
    """

    def __init__(
        self,
        sources: Sequence[DataSource],
        weights: Sequence[float] | None = None,
        *,
        seq_len: int,
        lookahead: int,
        seed: int,
    ) -> None:
        weights = [1.0] * len(sources) if weights is None else list(weights)
        if not sources or len(sources) != len(weights) or min(weights) <= 0:
            got = f"{len(sources)} sources, weights {weights}"
            raise ValueError(f"one weight > 0 per source is needed: {got}")
        if seq_len < 1 or lookahead < 0:
            got = f"{seq_len} and {lookahead}"
            raise ValueError(f"seq_len must be >= 1 and lookahead >= 0, got {got}")
        self.sources = list(sources)
        self.weights = [weight / sum(weights) for weight in weights]
        self.seq_len, self.lookahead, self.seed = seq_len, lookahead, seed
        self.samples = 0
        self.counts = [0] * len(sources)
        self._prepared: tuple[list[tuple[int, int]], int, list[RowBatch]] | None = None
        self.masked = any(is_masked(source) for source in sources)
        self._streams = [source.stream(seq_len, (seed, i)) for i, source in enumerate(sources)]

    def next_batch(
        self,
        batch_size: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        micro_batch_size: int | None = None,
    ) -> list[RowBatch]:
        """This rank's micro-batches of the next global batch of `batch_size` samples.

        Rank r gets the r-th of `world_size` equal slices, cut into micro-batches of
        `micro_batch_size` rows (None: one). `documents` starts at 0 in each row and rises by 1 at
        each document border. Every rank's counters advance by the whole global batch. Raises
        ValueError when the batch does not divide.
        """
        picks, micro = self._share(batch_size, rank, world_size, micro_batch_size)
        prepared, self._prepared = self._prepared, None
        if prepared is not None and prepared[:2] == (picks, micro):
            return prepared[2]
        return self._read(picks, micro)

    def prepare(
        self,
        batch_size: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        micro_batch_size: int | None = None,
    ) -> None:
        """Reads what `next_batch` of the same arguments will return, and stays where it is."""
        position = self.samples, list(self.counts)
        picks, micro = self._share(batch_size, rank, world_size, micro_batch_size)
        self.samples, self.counts = position
        self._prepared = picks, micro, self._read(picks, micro)

    def consumed(self) -> RowBatch:
        """All rows of text given so far, as (tokens, documents), each (n, T + 1), and of each
        source at most one epoch: in these rows every token that was trained on is a target once.
        """
        rows = [
            stream.sample(index, self.seq_len + 1)
            for stream, count in zip(self._streams, self.counts, strict=True)
            for index in range(min(count, stream.windows))  # type: ignore[attr-defined]
        ]
        return _stack(rows)

    def state_dict(self) -> dict[str, Any]:
        """JSON-able. Independent of the number of ranks and of `lookahead`."""
        position = {"version": 1, "samples": self.samples, "counts": list(self.counts)}
        return position | self._identity()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where `state` was taken; ValueError, all differences: it is of another stream."""
        now = self._identity()
        changed = [key for key in now if state.get(key) != now[key]]
        differences = [f"{key}: saved {state.get(key)}, now {now[key]}" for key in changed]
        if len(state["counts"]) != len(self.counts):
            differences.append(f"counts of {len(state['counts'])} corpora, now {len(self.counts)}")
        if differences:
            raise ValueError(
                "the saved data position belongs to another token stream; restore these settings, "
                "or start a new run under another run.name:\n  " + "\n  ".join(differences)
            )
        self.samples = int(state["samples"])
        self.counts = [int(count) for count in state["counts"]]

    def _share(
        self, batch_size: int, rank: int, world_size: int, micro_batch_size: int | None
    ) -> tuple[list[tuple[int, int]], int]:
        """This rank's (source, index within it) of the next batch, and rows of a micro-batch."""
        rows = _divide(batch_size, world_size, micro_batch_size)
        picks = [self._pick() for _ in range(batch_size)]
        return picks[rank * rows : (rank + 1) * rows], micro_batch_size or rows

    def _read(self, picks: list[tuple[int, int]], micro: int) -> list[RowBatch]:
        length = self.seq_len + self.lookahead
        samples = [self._streams[source].sample(index, length) for source, index in picks]
        return [_stack(samples[i : i + micro]) for i in range(0, len(samples), micro)]

    def _pick(self) -> tuple[int, int]:
        """(source, index within it) of the next sample: the source that lags its share most."""
        self.samples += 1
        pairs = zip(self.weights, self.counts, strict=True)
        lag = [weight * self.samples - count for weight, count in pairs]
        source = lag.index(max(lag))
        self.counts[source] += 1
        return source, self.counts[source] - 1

    def _identity(self) -> dict[str, Any]:
        sources = [
            {"manifest_hash": s.manifest_hash, "tokens": s.tokens, "documents": s.documents}
            for s in self.sources
        ]
        own = {"seq_len": self.seq_len, "seed": self.seed, "weights": self.weights}
        return own | {"sources": sources}


def sequential_windows(
    source: DataSource,
    *,
    seq_len: int,
    lookahead: int,
    count: int,
    rank: int = 0,
    world_size: int = 1,
    micro_batch_size: int | None = None,
) -> list[RowBatch]:
    """Exactly `count` fixed windows for validation, evenly spread over `source` in its order.

    The windows are the same for every number of ranks and start at the same tokens for every
    `lookahead`. Windows repeat when the source has fewer than `count`; past the last document the
    first follows (as another document). A task has no end: these are its first validation rows.
    Micro-batches of `micro_batch_size` rows (None: one slice per rank) are dealt to the ranks in
    turn, see `windows_of_rank`.
    """
    stream, length = source.stream(seq_len, None), seq_len + lookahead
    dealt: Any = {"rank": rank, "world_size": world_size, "micro_batch_size": micro_batch_size}
    batches = windows_of_rank(count, **dealt)
    return [_stack([stream.spread(row, count, length) for row in rows]) for rows in batches]


def spare_windows(
    source: Source, *, seq_len: int, lookahead: int, count: int, most: int
) -> RowBatch:
    """At most `most` windows, evenly spread, that are none of the `count` of `sequential_windows`:
    (tokens, documents), each (n, T + lookahead), where n may be 0.
    """
    stream = source.stream(seq_len, None)
    taken = {stream.place(index, count) for index in range(count)}
    free = [window for window in range(stream.available) if window not in taken]
    chosen = [free[n * len(free) // most] for n in range(most)] if len(free) > most else free
    if not chosen:
        return np.zeros((0, seq_len + lookahead), np.int64), np.zeros((0, seq_len + lookahead))
    return _stack([stream.span(window * seq_len, seq_len + lookahead) for window in chosen])


def windows_of_rank(
    count: int, *, rank: int, world_size: int, micro_batch_size: int | None
) -> list[range]:
    """The validation rows, out of `count`, of each of this rank's micro-batches."""
    micro = micro_batch_size or -(-count // world_size)
    return [range(i, min(i + micro, count)) for i in range(0, count, micro)][rank::world_size]


def is_masked(source: DataSource) -> bool:
    """It is text of which not every token is a target."""
    return source.text is not None and source.text.masks is not None


def _divide(batch_size: int, world_size: int, micro_batch_size: int | None) -> int:
    """Rows per rank."""
    rows = batch_size // world_size
    if rows * world_size != batch_size or rows % (micro_batch_size or rows or 1) or rows == 0:
        raise ValueError(
            f"a batch of {batch_size} sequences does not divide into {world_size} ranks x "
            f"micro-batches of {micro_batch_size or 'any'} sequences; make it a multiple of "
            f"{world_size * (micro_batch_size or 1)}"
        )
    return rows


def _stack(samples: list[RowBatch]) -> RowBatch:
    """Rows of one source or of several. Where a source names no targets, every token is one."""
    if len({len(sample) for sample in samples}) > 1:
        samples = [(*sample, np.ones(len(sample[0]), np.bool_))[:3] for sample in samples]
    return tuple(np.stack(parts) for parts in zip(*samples, strict=True))
