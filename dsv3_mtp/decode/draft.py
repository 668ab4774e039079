"""What every drafter shares: from the trunk's states and the known tokens to K guesses per row.

The drafter of a kind of head stands in that kind's file (heads/).

A drafter is told the trunk's states of new slots (`observe`) and asked for drafts (`draft`). It
owns the caches of its modules. All of them follow training exactly: slot i of depth k sees what the
teacher-forced forward would show it if the drafts were the text. Slots of depth k whose token
t_{i+k} is still a draft are computed again once it is known.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dsv3_mtp.config import MTPConfig
from dsv3_mtp.decode.cache import CacheSlots, Ring, put
from dsv3_mtp.decode.decoder import Decoder
from dsv3_mtp.decode.sample import DraftSampler
from dsv3_mtp.model.causal_lm import DeepseekV3MTP
from dsv3_mtp.model.states import TrunkStates
from dsv3_mtp.ops.c_step import Drafting


class Drafter:
    """What all kinds share: a ring of the trunk's states, caches of `depths` modules, rows of a
    batch.
    """

    # Slots that a module may fall behind while the drafts end before its depth: it computes them in
    # one forward, which costs little more than one slot.
    LAG = 16

    def __init__(
        self,
        decoder: Decoder,
        slots: CacheSlots,
        *,
        rows: int,
        depth: int,
        chunk: int,
        recycle: str = "last",
    ):
        """depth: most drafts per step; chunk: most slots that one `observe` brings; recycle: which
        module drafts beyond the trained depths.
        """
        model = decoder.model
        self.decoder, self.model, self.slots, self.depth = decoder, model, slots, depth
        self.options: Any = model.mtp_config.options
        self.recycle = recycle
        self.modules = self.modules_needed()
        width = max(chunk, depth + 1) + 2 * (self.modules + depth + self.LAG)
        self.rings = [
            Ring(rows, width, model.model.norm.weight[None]) for _ in range(self.rings_needed())
        ]
        self.caches = slots.caches(self.caches_needed(), rows)  # (B, S, R+P) per module
        # [module][row]: slots whose inputs were all known
        self.filled = [[0] * rows for _ in range(self.caches_needed())]

    @classmethod
    def limit(cls, mtp: MTPConfig, depth: int) -> int:
        """Most drafts per step, of the `depth` that are asked for."""
        return min(depth, mtp.depths)

    @classmethod
    def origin(cls, mtp: MTPConfig, draft: int) -> tuple[int, int]:
        """Of draft 1, 2, ..: the depth whose guess it is, and how many slots before m - 1, the last
        one that the trunk has computed, that guess is made.
        """
        return draft, 0

    def modules_needed(self) -> int:
        """Depths that read the known tokens, each with a cache of its own."""
        return min(self.depth, self.model.depths)

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
        self, ids: Tensor, last: Sequence[int], count: int, sampler: DraftSampler
    ) -> tuple[Tensor, Tensor | None]:
        """K <= `count` drafts t_{m+1}.. for each row, m = last[b]: (B, K), and for sampling their
        probabilities. Fewer than `count` where `sampler.ended` before.

        ids: (B, >S) with the drafts written into it on return; probabilities: (B, K, V) or None
            when greedy.
        """
        raise NotImplementedError

    def drafting(self) -> Drafting | None:
        """How a whole step runs in one call of C (ops/c_step.py); None: it goes piece by piece."""
        return None

    def lag(self, module: int, last: Sequence[int]) -> int:
        """Slots that a module has to catch up with, in the row where they are most."""
        return max(m - filled for m, filled in zip(last, self.filled[module], strict=True))

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


def no_drafter(mtp: MTPConfig) -> str | None:
    """Why nothing drafts with these heads, in one sentence; None where they draft."""
    if not mtp.depths:
        return "the model has no MTP heads to draft with (mtp.mode: none)"
    kind = mtp.kind.drafter(mtp)
    return f"mtp.mode {mtp.mode} {kind}" if isinstance(kind, str) else None


def draft_limit(model: DeepseekV3MTP, depth: int) -> int:
    """Most drafts per step, of the `depth` that are asked for: a chain is recycled for any depth,
    independent heads end at D; 0 where nothing drafts.
    """
    mtp = model.mtp_config
    if no_drafter(mtp) is not None:
        return 0
    return mtp.kind.drafter(mtp).limit(mtp, depth)


def write_drafts(
    ids: Tensor, last: Sequence[int], drawn: list[tuple[Tensor, Tensor | None]]
) -> tuple[Tensor, Tensor | None]:
    """What `draft` returns, from each depth's tokens (B,) and probabilities (B, V); puts the drafts
    into ids.
    """
    drafts, probabilities = stacked(drawn)
    for depth, tokens in enumerate(drafts.unbind(1), start=1):
        put(ids, [m + depth for m in last], tokens)
    return drafts, probabilities


def stacked(drawn: list[tuple[Tensor, Tensor | None]]) -> tuple[Tensor, Tensor | None]:
    """(B,) tokens and (B, V) probabilities of each depth -> (B, K) and (B, K, V), None when
    greedy.
    """
    tokens, probabilities = zip(*drawn, strict=True)
    if probabilities[0] is None:
        return torch.stack(tokens, 1), None
    return torch.stack(tokens, 1), torch.stack(probabilities, 1)
