"""Medusa-1's heads (arXiv 2401.10774): a residual block and an output head each, on one state.

Section 2.1.1, for head k on the trunk's final state h_i, which is that of the main output head:

    q_k = softmax(W2_k (SiLU(W1_k h_i) + h_i))

At the start W1_k is 0 and W2_k the main output head, so that every head says what the main head
says. Medusa-1 trains them on a frozen trunk (`train.freeze: trunk`) with lambda_k = 0.8^k. The
authors' code gives W1 a bias and can stack blocks; the paper's equation does neither, and this file
is the equation. Their drafts form a tree with several candidates of each head; here each head gives
one draft, because the verifier takes one path.
"""

from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from dsv3_mtp.config import ModelConfig, MTPConfig
from dsv3_mtp.decode.draft import Drafter
from dsv3_mtp.heads.base import Cost, Export, Head, Writable, copy_weights
from dsv3_mtp.heads.linear import LinearDrafter
from dsv3_mtp.heads.parallel import trunk_alone
from dsv3_mtp.model.states import HeadInputs, HeadOutput, HeadRows, LMHead
from dsv3_mtp.model.trunk import Trunk


class MedusaHead(nn.Module):
    """One head: (.., C) states -> (.., V) logits."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.linear = nn.Linear(config.hidden_size, config.hidden_size, bias=False)  # W1
        self.lm_head = LMHead(config.hidden_size, config.vocab_size, bias=False)  # W2

    def read(self, state: Tensor) -> Tensor:
        """What the output head reads, (.., C)."""
        return F.silu(self.linear(state)) + state

    def forward(self, state: Tensor) -> Tensor:
        return self.lm_head(self.read(state))


class Medusa(Head):
    """D residual blocks with output heads of their own; no token is read."""

    name = "medusa"

    def __init__(self, config: ModelConfig, mtp: MTPConfig):
        super().__init__(config, mtp)
        self.heads = nn.ModuleList(MedusaHead(config) for _ in range(mtp.depths))

    def start(self, trunk: Trunk, lm_head: LMHead, writable: Writable) -> None:
        for head in cast(list[MedusaHead], self.heads):
            with writable(head.linear.weight):
                head.linear.weight.zero_()
            copy_weights(lm_head, head.lm_head, writable)

    @classmethod
    def reads(cls, mtp: MTPConfig) -> frozenset[str | int]:
        return frozenset({"post_norm"})

    def forward(self, inputs: HeadInputs) -> HeadOutput:
        state, heads = inputs.trunk.post_norm, cast(list[MedusaHead], self.heads)
        rows = [
            HeadRows((head.read(state),), (depth,), (head.lm_head,))
            for depth, head in enumerate(heads, start=1)
        ]
        return HeadOutput(rows)

    def cost(self) -> Cost:
        heads = cast(list[MedusaHead], self.heads)
        return Cost(
            first=[head.linear for head in heads],
            own=[head.lm_head for head in heads],
            kept=3 * self.config.hidden_size * len(heads),  # W1 h, its SiLU, and the sum
        )

    @classmethod
    def drafter(cls, mtp: MTPConfig) -> type[Drafter]:
        return LinearDrafter

    @classmethod
    def export(cls, config: ModelConfig, mtp: MTPConfig) -> Export:
        return trunk_alone(mtp)
