"""HSM, hidden state mixing (Megatron-LM pull requests 5340 and 6566): V3's chain that trains on
states of several depths.

In drafting, module k reads states that its training never made: of drafts, and of a module that is
used again beyond its depth. HSM shows it more kinds of states: for every token, what module k reads
is drawn uniformly from the k states that are made to predict the same token, t_{i+k}:

    depth j's state at slot i+k-1-j, j = 0..k-1         j = 0: the trunk; j = k-1: V3's own

The embedding is that of t_{i+k}, as ever, and no candidate has read farther. Where slot i+k-1-j is
no slot of the row, or of slot i's document, the newest state is read (Megatron does likewise, and
at the borders of its ranks as well, where here the state and its gradient are exchanged). Only
training mixes: validation and drafting read the newest state, V3's chain. A draw is a hash
(`HeadInputs.uniform`), so that every layout of ranks and a resumed run draw the same.
"""

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from dsv3_mtp.config import MTPConfig
from dsv3_mtp.config.reader import Problem
from dsv3_mtp.heads.sequential import Sequential, SequentialOptions
from dsv3_mtp.model.states import HeadInputs


class HSMOptions(SequentialOptions):
    """Keys of `mtp:` with mode hsm: those of the chain that it mixes."""

    chain: Literal["hidden"] = "hidden"
    """Module k reads states of the chain."""
    embed: Literal[True] = True
    """Modules read the embedding of the token at i+k (V3 eq. 21)."""


class HiddenStateMixing(Sequential):
    """V3's chain, each module reading a state drawn from those aligned with the newest."""

    name, default = "hsm", False
    Options = HSMOptions

    @classmethod
    def problems(cls, mtp: MTPConfig) -> Iterator[Problem]:
        if mtp.depths < 2:
            text = "must be >= 2 with mode hsm: module 1 has the trunk's state alone to read"
            yield "num_nextn_predict_layers", f"{text} (got {mtp.depths})"

    def previous(self, states: Sequence[Tensor], inputs: HeadInputs) -> Tensor:
        depth, mixed = len(states), states[-1]
        if not self.training or depth == 1:
            return mixed
        drawn = (inputs.uniform(depth) * depth).long()  # (B, T): the depth whose state is read
        for older, state in enumerate(states[:-1]):
            aligned, there = inputs.later(state, depth - 1 - older)
            mixed = torch.where(((drawn == older) & there).unsqueeze(-1), aligned, mixed)
        return mixed
