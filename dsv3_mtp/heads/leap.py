"""L-MTP, leaps (arXiv 2505.17505): depth k predicts t_{i+sk+1}, and s-1 tokens between are skipped.

The paper's head i (1 is the main head) predicts t_{i' + s(i-1) + 1} of slot i'; here the main head
is depth 0, so that s = 1 is Medusa. The heads are Medusa's, as in the authors' code. A sample has
T + 1 + sD tokens.

D heads draft sD tokens: the tokens that one slot skips are those that the s-1 slots before it
predict ("looking backward"). With s = 2, t_m the last known token, and so the trunk's
states of slots 0..m-1:

    draft     t_{m+1}   t_{m+2}   t_{m+3}   t_{m+4}
    depth     1         1         2         2
    slot      m-2       m-1       m-2       m-1

No token is read, so that a slot's guess needs no token that came after it.
"""

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import Field
from torch import Tensor

from dsv3_mtp.config import MTPConfig
from dsv3_mtp.config.section import Integer, Section
from dsv3_mtp.decode.cache import CacheSlots
from dsv3_mtp.decode.decoder import Decoder
from dsv3_mtp.decode.draft import Drafter, write_drafts
from dsv3_mtp.decode.sample import DraftSampler
from dsv3_mtp.heads.linear import LinearDrafter
from dsv3_mtp.heads.medusa import Medusa


class LeapOptions(Section):
    """Keys of `mtp:` with mode leap."""

    stride: Annotated[Integer, Field(ge=1, le=64)] = 2
    """s: depth k predicts t_{i+sk+1} (arXiv 2505.17505)."""


class Leap(Medusa):
    """Medusa's heads, s tokens apart."""

    name = "leap"
    Options = LeapOptions

    @classmethod
    def offset(cls, mtp: MTPConfig, depth: int) -> int:
        return mtp.options.stride * depth + 1

    @classmethod
    def drafter(cls, mtp: MTPConfig) -> type[Drafter]:
        return LeapDrafter


class LeapDrafter(LinearDrafter):
    """s drafts from each head, of the last s slots."""

    def __init__(
        self, decoder: Decoder, slots: CacheSlots, *, depth: int, chunk: int, **sizes: Any
    ):
        # the ring reaches s slots back behind the slots that one `observe` brings
        chunk = max(chunk, depth + 1) + decoder.model.mtp_config.options.stride
        super().__init__(decoder, slots, depth=depth, chunk=chunk, **sizes)

    @classmethod
    def limit(cls, mtp: MTPConfig, depth: int) -> int:
        return min(depth, mtp.options.stride * mtp.depths)

    @classmethod
    def origin(cls, mtp: MTPConfig, draft: int) -> tuple[int, int]:
        head, back = divmod(draft - 1, mtp.options.stride)
        return head + 1, mtp.options.stride - 1 - back

    def draft(
        self, ids: Tensor, last: Sequence[int], count: int, sampler: DraftSampler
    ) -> tuple[Tensor, Tensor | None]:
        drawn = []
        for number in range(1, 1 + count):
            depth, back = self.origin(self.model.mtp_config, number)
            # Slot 0 stands in for one before it: it aims at a later token, and its draft is
            # verified like any other.
            slots = [max(m - 1 - back, 0) for m in last]
            hidden = self.rings[0].read(slots, 1).squeeze(1)  # (B, C)
            drawn.append(sampler.draw(self.decoder.narrow(self.model.mtp.heads[depth - 1](hidden))))
            if sampler.ended:
                break
        return write_drafts(ids, last, drawn)
