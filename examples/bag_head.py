"""A kind of head outside the package: one layer predicts the next D tokens as a bag, unordered.

    deepspeed tools/train.py --config configs/v3_tiny.yaml \\
        --set mtp.mode=examples.bag_head:BagHead --set mtp.num_nextn_predict_layers=3

One decoder layer reads what the trunk's last layer reads. Its output is scored once, against each
of t_{i+2} .. t_{i+1+D}: a row with several targets. docs/extend.md explains it line by line.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn

from dsv3_mtp.config import ModelConfig, MTPConfig
from dsv3_mtp.decode.draft import Drafter, write_drafts
from dsv3_mtp.decode.sample import DraftSampler
from dsv3_mtp.heads.base import Cost, Export, Head, Theory
from dsv3_mtp.heads.parallel import Block, ParallelDrafter, ParallelHead
from dsv3_mtp.model.states import HeadInputs, HeadOutput, HeadRows


class BagHead(Head):
    """D tokens from one hidden state: which come next, not in which order."""

    def __init__(self, config: ModelConfig, mtp: MTPConfig):
        super().__init__(config, mtp)
        self.layer = ParallelHead(config)  # a decoder layer of the trunk's kind, and a norm

    @classmethod
    def reads(cls, mtp: MTPConfig) -> frozenset[str | int]:
        return frozenset({"last_input"})

    def forward(self, inputs: HeadInputs) -> HeadOutput:
        out, stats = self.layer(inputs.trunk.last_input, inputs.angles, inputs.mask)
        depths = tuple(range(1, 1 + self.mtp.depths))
        rows = HeadRows((self.layer.shared_head(out),), depths, (inputs.lm_head,))
        return HeadOutput([rows], [stats])

    def cost(self) -> Cost:
        return Cost(blocks=[self.layer], shared=1)

    @classmethod
    def drafter(cls, mtp: MTPConfig) -> type[Drafter]:
        return BagDrafter

    def decode_forms(self, model: nn.Module) -> list[Any]:
        return [Block(self.layer)]

    @classmethod
    def export(cls, config: ModelConfig, mtp: MTPConfig) -> Export:
        why = "DeepSeek-V3's layout has no place for a bag of tokens"
        return Export(problems=[f"mtp.mode: {mtp.mode}: {why}; export the trunk with --trunk-only"])

    @classmethod
    def theory(cls, mtp: MTPConfig, chain: np.ndarray) -> Theory:
        """The lowest sum_k w_k CE(P^(k+1), q) is at the weighted mean of the rows of P^(k+1)."""
        depths = range(1, 1 + mtp.depths)
        powers = [np.linalg.matrix_power(chain, k + 1) for k in depths]
        bag = np.average(powers, axis=0, weights=mtp.depth_weights)
        ordered = (-bag).argsort(1, kind="stable")  # (S, S): the most likely token first
        return Theory([bag] * len(depths), [ordered[:, k - 1] for k in depths])


class BagDrafter(ParallelDrafter):
    """Greedy drafts are the bag's most likely tokens in order; samples are independent draws."""

    def caches_needed(self) -> int:
        return 1

    def draft(
        self, ids: Tensor, last: Sequence[int], count: int, sampler: DraftSampler
    ) -> tuple[Tensor, Tensor | None]:
        logits, drawn = self.decoder.logits(self.run(0, last)), []
        for _ in range(count):
            drawn.append(sampler.draw(self.decoder.narrow(logits)))
            if sampler.ended:
                break
            if sampler.greedy:
                logits = logits.scatter(1, drawn[-1][0][:, None], float("-inf"))
        return write_drafts(ids, last, drawn)
