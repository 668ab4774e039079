"""Multi-token prediction without heads: the main head's logits are scored against later tokens too.

modded-nanogpt (pull request 178): L = sum_k w_k CE(logits_i, t_{i+k+1}), k = 0..D, the same logits
for every k, with weights that fall to 0 in training (`mtp.depth_weights: {type: annealed}`). No
parameter is added. w_0 = 1 is L_main, the others are lambda / D w_k as ever. mtp_loss/k measures
the main head against a later token: what the next token's distribution says of it.
"""

import numpy as np

from dsv3_mtp.config import ModelConfig, MTPConfig
from dsv3_mtp.heads.base import Cost, Export, Head, Theory
from dsv3_mtp.model.states import HeadInputs, HeadOutput, HeadRows


class SameLogits(Head):
    """No parameters: one row with D more targets, scored by the main output head."""

    name = "same_logits"

    @classmethod
    def reads(cls, mtp: MTPConfig) -> frozenset[str | int]:
        return frozenset({"post_norm"})

    def forward(self, inputs: HeadInputs) -> HeadOutput:
        depths = tuple(range(1, 1 + self.mtp.depths))
        return HeadOutput([HeadRows((inputs.trunk.post_norm,), depths, (inputs.lm_head,))])

    def cost(self) -> Cost:
        return Cost(shared=1, rows_of_trunk=True)

    @classmethod
    def drafter(cls, mtp: MTPConfig) -> str:
        return "has no drafter: its logits are those of the next token"

    @classmethod
    def export(cls, config: ModelConfig, mtp: MTPConfig) -> Export:
        return Export(notes=["mtp.mode: same_logits adds no weights: the trunk is the whole model"])

    @classmethod
    def load(cls, config: ModelConfig, mtp: MTPConfig, stored: int, trunk_hidden: str) -> Export:
        return Export()

    @classmethod
    def theory(cls, mtp: MTPConfig, chain: np.ndarray) -> Theory:
        """Once the weights have fallen to 0: the next token's distribution at every depth."""
        return Theory([chain] * mtp.depths)
