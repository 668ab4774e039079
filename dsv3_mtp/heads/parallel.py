"""Meta's heads (arXiv 2404.19737): independent transformer layers beside the trunk's last one.

They read that layer's input, so that the trunk's last layer is head 1. No token is read. The paper
and its released code share the unembedding; every head has a norm of its own here.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from dsv3_mtp.config import ModelConfig, MTPConfig
from dsv3_mtp.decode.cache import FewSlots, Window
from dsv3_mtp.decode.draft import Drafter, write_drafts
from dsv3_mtp.decode.layers import Layers
from dsv3_mtp.decode.sample import DraftSampler
from dsv3_mtp.heads.base import Cost, Export, Head, SharedHead
from dsv3_mtp.model.block import DecoderLayer
from dsv3_mtp.model.states import HeadInputs, HeadOutput, HeadRows, TrunkStates


class ParallelHead(DecoderLayer):
    """One of Meta's extra heads: a transformer layer and a norm; no embedding, no projection."""

    def __init__(self, config: ModelConfig):
        super().__init__(config, layer=config.num_hidden_layers - 1)
        self.shared_head = SharedHead(config)


class Parallel(Head):
    """D independent heads beside the trunk's last layer, reading its input; shared output head."""

    name = "parallel"

    def __init__(self, config: ModelConfig, mtp: MTPConfig):
        super().__init__(config, mtp)
        self.layers = nn.ModuleList(ParallelHead(config) for _ in range(mtp.depths))

    @classmethod
    def reads(cls, mtp: MTPConfig) -> frozenset[str | int]:
        return frozenset({"last_input"})

    def forward(self, inputs: HeadInputs) -> HeadOutput:
        rows, stats = [], []
        for depth, head in enumerate(self.layers, start=1):
            out, routed = head(inputs.trunk.last_input, inputs.angles, inputs.mask)
            read = head.shared_head(out)  # type: ignore[operator]
            rows.append(HeadRows((read,), (depth,), (inputs.lm_head,)))
            stats.append(routed)
        return HeadOutput(rows, stats)

    def cost(self) -> Cost:
        return Cost(list(self.layers), shared=len(self.layers))

    @classmethod
    def drafter(cls, mtp: MTPConfig) -> type[Drafter]:
        return ParallelDrafter

    def decode_forms(self, model: nn.Module) -> list[Any]:
        return [Block(head) for head in self.layers]  # type: ignore[arg-type]

    @classmethod
    def export(cls, config: ModelConfig, mtp: MTPConfig) -> Export:
        return trunk_alone(mtp)


def trunk_alone(mtp: MTPConfig) -> Export:
    """The trunk is exported, its heads are left out and named."""
    why = "the layout has no place for them; the trunk is complete without them"
    return Export(notes=[f"not exported: the {mtp.depths} {mtp.mode} MTP head(s), {why}"])


# --- decoding -----------------------------------------------------------------------------------


class Block:
    """A transformer layer and its norm, made ready to decode."""

    def __init__(self, head: ParallelHead):
        self.layer = Layers([head], head.shared_head.norm)

    def forward(self, x: Tensor, cache: Tensor, window: Window | FewSlots) -> Tensor:
        """Inputs (B*T, C) -> normed states of the rows that are asked for."""
        return self.layer(x, None, [cache], window)[-1]


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
        # prefill; the last slot is left to `draft`, which needs its state
        if length > self.depth + 1:
            for head in range(len(self.caches)):
                self.run(head, [s + length - 1 for s in starts])

    def draft(self, ids: Tensor, last: Sequence[int], count: int, sampler: DraftSampler):
        drawn: list[Any] = []
        while len(drawn) < count and not sampler.ended:
            drawn.append(sampler.draw(self.decoder.draft_logits(self.run(len(drawn), last))))
        for head in range(len(drawn), len(self.caches)):
            if self.lag(head, last) > self.LAG:
                self.run(head, last)
        return write_drafts(ids, last, drawn)

    def run(self, head: int, stops: Sequence[int]) -> Tensor:
        """Brings a head's cache up to slot stops[b] - 1; returns its normed state, (B, C)."""
        starts = self.filled[head]
        counts = [stop - start for start, stop in zip(starts, stops, strict=True)]
        length = max(counts)
        x = self.rings[0].read(starts, length).flatten(0, 1)  # (B*T, C)
        asked = [row * length + count - 1 for row, count in enumerate(counts)]
        window = self.decoder.window(self.slots, starts, length, asked)
        self.filled[head] = list(stops)
        head_form = self.decoder.heads[head]
        return self.decoder.run(Block.forward, head_form, x, self.caches[head], window)
