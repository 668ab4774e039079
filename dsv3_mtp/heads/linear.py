"""Bare linear vocabulary heads on the trunk's normed output (lingua's variant, not Meta's)."""

from collections.abc import Sequence

from torch import Tensor, nn

from dsv3_mtp.config import ModelConfig, MTPConfig
from dsv3_mtp.decode.draft import Drafter, write_drafts
from dsv3_mtp.decode.sample import DraftSampler
from dsv3_mtp.heads.base import Cost, Export, Head
from dsv3_mtp.heads.parallel import trunk_alone
from dsv3_mtp.model.states import HeadInputs, HeadOutput, HeadRows, LMHead, TrunkStates


class ParallelLinear(Head):
    """D output heads of their own on the trunk's final state: no block, no norm, no token."""

    name = "parallel_linear"

    def __init__(self, config: ModelConfig, mtp: MTPConfig):
        super().__init__(config, mtp)
        self.heads = nn.ModuleList(
            LMHead(config.hidden_size, config.vocab_size, bias=False) for _ in range(mtp.depths)
        )

    @classmethod
    def reads(cls, mtp: MTPConfig) -> frozenset[str | int]:
        return frozenset({"post_norm"})

    def forward(self, inputs: HeadInputs) -> HeadOutput:
        states = inputs.trunk.post_norm
        return HeadOutput(
            [HeadRows((states,), (depth,), (head,)) for depth, head in enumerate(self.heads, 1)]  # type: ignore[arg-type]
        )

    def cost(self) -> Cost:
        return Cost(own=list(self.heads), rows_of_trunk=True)  # type: ignore[arg-type]

    @classmethod
    def drafter(cls, mtp: MTPConfig) -> type[Drafter]:
        return LinearDrafter

    @classmethod
    def export(cls, config: ModelConfig, mtp: MTPConfig) -> Export:
        return trunk_alone(mtp)


class LinearDrafter(Drafter):
    """Bare linear heads on the trunk's normed state: nothing to cache."""

    def caches_needed(self) -> int:
        return 0

    def source(self, states: TrunkStates) -> Tensor:
        return states.post_norm

    def draft(self, ids: Tensor, last: Sequence[int], count: int, sampler: DraftSampler):
        hidden = self.rings[0].read([m - 1 for m in last], 1).squeeze(1)  # (B, C)
        drawn = []
        for head in self.model.mtp.heads[:count]:
            drawn.append(sampler.draw(self.decoder.narrow(head(hidden))))
            if sampler.ended:
                break
        return write_drafts(ids, last, drawn)
