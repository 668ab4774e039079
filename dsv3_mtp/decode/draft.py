"""Drafters: from the trunk's states and the known tokens to K guesses per row, for every kind of
head.

A drafter is told the trunk's states of new slots (`observe`) and asked for drafts (`draft`). It
owns the caches of its modules. All of them follow training exactly: slot i of depth k sees what the
teacher-forced forward would show it if the drafts were the text. Slots of depth k whose token
t_{i+k} is still a draft are computed again once it is known.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dsv3_mtp.decode.cache import Ring, Slots, span
from dsv3_mtp.decode.decoder import Decoder
from dsv3_mtp.decode.sample import Sampler
from dsv3_mtp.heads.heads import TrunkStates
from dsv3_mtp.model.causal_lm import DeepseekV3MTP


class Drafter:
    """What all kinds share: a ring of the trunk's states, caches of `depths` modules, rows of a
    batch.
    """

    def __init__(self, decoder: Decoder, slots: Slots, *, rows: int, depth: int, chunk: int):
        """depth: most drafts per step; chunk: most slots that one `observe` brings."""
        model = decoder.model
        self.decoder, self.model, self.slots, self.depth = decoder, model, slots, depth
        self.modules = min(depth, model.depths)
        width = max(chunk, depth + 1) + 2 * (self.modules + 1)
        self.rings = [
            Ring(rows, width, model.model.norm.weight[None]) for _ in range(self.rings_needed())
        ]
        self.caches = slots.caches(self.caches_needed(), rows)  # (B, S, R+P) per module
        # [module][row]: slots whose inputs were all known
        self.filled = [[0] * rows for _ in range(self.caches_needed())]

    def rings_needed(self) -> int:
        return 1

    def caches_needed(self) -> int:
        return self.modules

    def source(self, states: TrunkStates) -> Tensor:
        """The trunk state that the heads read."""
        raise NotImplementedError

    def observe(
        self, states: TrunkStates, starts: Sequence[int], ids: Tensor, known: int = 0
    ) -> None:
        """The trunk has computed slots starts[b].. of each row. states: (B*T, C).

        ids: (B, >S) tokens of the rows; known: in a prefill, how many of them are known, the same
            for all rows.
        """
        self.rings[0].write(
            starts, self.source(states).view(len(starts), -1, self.rings[0].states.shape[-1])
        )

    def draft(
        self, ids: Tensor, last: Sequence[int], count: int, sampler: Sampler
    ) -> tuple[Tensor, Tensor | None]:
        """`count` drafts t_{m+1}.. for each row, m = last[b]: (B, count), and for sampling their
        probabilities.

        ids: (B, >S) with the drafts written into it on return; probabilities: (B, count, V) or None
            when greedy.
        """
        raise NotImplementedError

    def join(self, others: "Sequence[Drafter]") -> None:
        """Appends the rows of drafters of the same shape."""
        for ring, *more in zip(self.rings, *(other.rings for other in others), strict=True):
            ring.states = torch.cat([ring.states, *(r.states for r in more)])
        self.caches = [
            torch.cat(same)
            for same in zip(self.caches, *(other.caches for other in others), strict=True)
        ]
        for module, filled in enumerate(self.filled):
            filled.extend(row for other in others for row in other.filled[module])

    def keep(self, rows: list[int]) -> None:
        """Drops the other rows."""
        for ring in self.rings:
            ring.states = ring.states[rows]
        self.caches = [cache[rows] for cache in self.caches]
        self.filled = [[filled[row] for row in rows] for filled in self.filled]


class ChainDrafter(Drafter):
    """Sequential modules: depth k reads the state of depth k-1 and the embedding of the token k
    ahead.

    Beyond the trained depths the last module goes on, one slot further per draft, as serving
    engines recycle it: its own state stands in for the trunk state of a slot that the trunk has not
    seen.

    Two modules, three drafts; t_m is the last known token, so that the trunk has states of slots
    0..m-1:

        module 1, slot m-1   reads the trunk's state of m-1      and t_m       drafts t_{m+1}
        module 2, slot m-1   reads module 1's state of m-1       and t_{m+1}   drafts t_{m+2}
        module 2, slot m     reads its own state of m-1          and t_{m+2}   drafts t_{m+3}

    If t_{m+1} stands and t_{m+2} is replaced, m grows by 2. Module 1 then computes slots m and m+1
    (old m). Module 2 begins at m-1 again: the token it read there was a draft. `filled` holds where
    each module begins.
    """

    def rings_needed(self) -> int:
        return self.modules if self.model.mtp_config.chain == "hidden" else 1

    def source(self, states: TrunkStates) -> Tensor:
        return (
            states.post_norm
            if self.model.mtp_config.trunk_hidden == "post_norm"
            else states.pre_norm
        )

    def observe(
        self, states: TrunkStates, starts: Sequence[int], ids: Tensor, known: int = 0
    ) -> None:
        super().observe(states, starts, ids, known)
        length = states.post_norm.shape[0] // len(starts)
        if length <= self.depth + 1:  # a decode step: `draft` comes next and catches up
            return
        for depth in range(
            1, 1 + self.modules
        ):  # prefill: slots whose token k ahead is in the prompt
            first = self.filled[depth - 1]
            stop = min(starts[0] + length, known - depth)
            if stop > first[0]:
                self._run(depth, first, stop - first[0], ids)
                self.filled[depth - 1] = [stop] * len(starts)

    def draft(self, ids: Tensor, last: Sequence[int], count: int, sampler: Sampler):
        rows = torch.arange(len(last), device=ids.device)
        drawn, hidden = [], None
        for depth in range(1, 1 + count):
            if depth <= self.modules:
                starts = self.filled[depth - 1]
                counts = [m - start for m, start in zip(last, starts, strict=True)]
                out, normed = self._run(depth, starts, max(counts), ids)  # (B, T, C)
                self.filled[depth - 1] = [
                    max(s, m - depth + 1) for s, m in zip(starts, last, strict=True)
                ]
                pick: Any = slice(None), slice(-1, None)  # the last slot of each row
                if min(counts) != max(counts):
                    pick = rows, torch.tensor(counts, device=ids.device) - 1
                hidden, normed = (
                    state[pick].view(len(last), -1) for state in (out, normed)
                )  # (B, C)
            else:
                starts = [m - 1 + depth - self.modules for m in last]
                if self.model.mtp_config.chain == "trunk":
                    hidden = self.rings[0].read([m - 1 for m in last], 1).squeeze(1)
                hidden, normed = self._module(self.modules, hidden, starts, 1, ids)
            drawn.append(sampler.draw(self.decoder.logits(normed)))  # (B,), (B, V)
            ids[rows, torch.tensor(last, device=ids.device) + depth] = drawn[-1][0]
        return _stacked(drawn)

    def _run(
        self, depth: int, starts: Sequence[int], length: int, ids: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Depth's chained and normed states of `length` slots from starts[b]; the next depth's ring
        gets them.
        """
        chained = self.model.mtp_config.chain == "hidden"
        hidden = self.rings[depth - 1 if chained else 0].read(starts, length).flatten(0, 1)
        out, normed = (
            x.view(len(starts), length, -1)
            for x in self._module(depth, hidden, starts, length, ids)
        )
        if chained and depth < self.modules:
            self.rings[depth].write(starts, out)
        return out, normed

    def _module(self, depth: int, hidden: Any, starts: Sequence[int], length: int, ids: Tensor):
        """One module on (B*T, C) states -> its chained and its normed state, each (B*T, C)."""
        tokens = span(ids, [start + depth for start in starts], length)
        window = self.slots.window(starts, length)
        return self.decoder.module(depth, hidden, tokens.flatten(), self.caches[depth - 1], window)


class ParallelDrafter(Drafter):
    """Meta's heads: each a layer beside the trunk's last one, reading that layer's input. No tokens
    are read.
    """

    def source(self, states: TrunkStates) -> Tensor:
        return states.last_input

    def observe(
        self, states: TrunkStates, starts: Sequence[int], ids: Tensor, known: int = 0
    ) -> None:
        super().observe(states, starts, ids, known)
        length = states.post_norm.shape[0] // len(starts)
        if (
            length > self.depth + 1
        ):  # prefill; the last slot is left to `draft`, which needs its state
            for head in range(self.modules):
                self._run(head, [s + length - 1 for s in starts])

    def draft(self, ids: Tensor, last: Sequence[int], count: int, sampler: Sampler):
        drawn = [sampler.draw(self.decoder.logits(self._run(head, last))) for head in range(count)]
        return _write_drafts(ids, last, drawn)

    def _run(self, head: int, stops: Sequence[int]) -> Tensor:
        """Brings head's cache up to slot stops[b] - 1 and returns that slot's normed state, (B,
        C).
        """
        starts = self.filled[head]
        counts = [stop - start for start, stop in zip(starts, stops, strict=True)]
        x = self.rings[0].read(starts, max(counts))  # (B, T, C)
        window = self.slots.window(starts, max(counts))
        out = self.decoder.head(head, x.flatten(0, 1), self.caches[head], window).view_as(x)
        self.filled[head] = list(stops)
        rows = torch.arange(len(counts), device=x.device)
        return out[rows, torch.tensor(counts, device=x.device) - 1]


class LinearDrafter(Drafter):
    """Bare linear heads on the trunk's normed state: nothing to cache."""

    def caches_needed(self) -> int:
        return 0

    def source(self, states: TrunkStates) -> Tensor:
        return states.post_norm

    def draft(self, ids: Tensor, last: Sequence[int], count: int, sampler: Sampler):
        hidden = self.rings[0].read([m - 1 for m in last], 1).squeeze(1)  # (B, C)
        return _write_drafts(
            ids, last, [sampler.draw(head(hidden)) for head in self.model.mtp.heads[:count]]
        )


def _write_drafts(ids: Tensor, last: Sequence[int], drawn: list[tuple[Tensor, Tensor | None]]):
    drafts, probabilities = _stacked(drawn)
    rows, first = torch.arange(len(last), device=ids.device), torch.tensor(last, device=ids.device)
    ids[rows[:, None], first[:, None] + torch.arange(1, 1 + drafts.shape[1], device=ids.device)] = (
        drafts
    )
    return drafts, probabilities


def _stacked(drawn: list[tuple[Tensor, Tensor | None]]) -> tuple[Tensor, Tensor | None]:
    """(B,) tokens and (B, V) probabilities of each depth -> (B, K) and (B, K, V), None when
    greedy.
    """
    probabilities = [probability for _, probability in drawn if probability is not None]
    return torch.stack([tokens for tokens, _ in drawn], 1), torch.stack(
        probabilities, 1
    ) if probabilities else None


KINDS = {"sequential": ChainDrafter, "parallel": ParallelDrafter, "parallel_linear": LinearDrafter}


def draft_limit(model: DeepseekV3MTP, depth: int) -> int:
    """Most drafts per step: a chain is recycled for any depth, independent heads end at D."""
    return depth if model.mtp_config.mode == "sequential" else min(depth, model.depths)
