"""TOP, token order prediction (arXiv 2508.19228): one extra output head that ranks what comes.

It reads the trunk's final state, as the main output head does, and learns which tokens of a window
come, the sooner the higher, instead of which token is where. With D = num_nextn_predict_layers the
window of slot i is t_{i+1} .. t_{i+1+D}; a token v that first comes at t_{i+1+d} has the score
y_v = D - d, every other one -infinity, as in the authors' seq_to_top, and the loss is ListNet's:

    L_TOP = - sum_v softmax(y)_v log softmax(W_TOP h_i)_v        L = L_main + L_TOP

softmax(y) falls by e per token of distance: beyond d = 16 less than 2e-7 of it is left, so that a
longer window (the authors' is as long as the sequence) is the same loss to float32.

L_TOP is the head's own term, mtp_term/top, a mean over the slots whose window holds a valid target;
targets that documents or `scored` leave out have no score. Its factor is `top_weight`. mtp_loss/k
is the cross-entropy of the same head with t_{i+k+1}: with lambda = 0, as the preset has it, it is
measured and trains nothing. With lambda > 0 and `top_weight: 0` the head learns the window as a bag
of words, each place in it alike (a summary of the future in the sense of arXiv 2510.14751, which
uses a binary cross-entropy per word). Nothing drafts with it: it is dropped at inference.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dsv3_mtp.config import ModelConfig, MTPConfig
from dsv3_mtp.config.section import NotNegative, Section
from dsv3_mtp.heads.base import Cost, Export, Head
from dsv3_mtp.heads.parallel import trunk_alone
from dsv3_mtp.model.states import HeadInputs, HeadOutput, HeadRows, LMHead, Scores, opened
from dsv3_mtp.ops.cross_entropy import linear_cross_entropy


class TOPOptions(Section):
    """Keys of `mtp:` with mode top."""

    top_weight: NotNegative = 1.0
    """Factor of L_TOP in the loss (arXiv 2508.19228: 1)."""


class TOP(Head):
    """One output head of its own on the trunk's final state, trained on the order of a window."""

    name = "top"
    Options = TOPOptions

    def __init__(self, config: ModelConfig, mtp: MTPConfig):
        super().__init__(config, mtp)
        self.head = LMHead(config.hidden_size, config.vocab_size, bias=False)

    @classmethod
    def reads(cls, mtp: MTPConfig) -> frozenset[str | int]:
        return frozenset({"post_norm"})

    def forward(self, inputs: HeadInputs) -> HeadOutput:
        state, depths = inputs.trunk.post_norm, tuple(range(1, 1 + self.mtp.depths))
        return HeadOutput([HeadRows((state,), depths, (self.head,))], kept={"state": state})

    @classmethod
    def terms(cls, mtp: MTPConfig) -> Mapping[str, float]:
        return {"top": mtp.options.top_weight}

    @classmethod
    def count_terms(cls, mtp: MTPConfig, valid: Tensor, taught: Tensor) -> Tensor:
        return valid.any(0).sum().view(1)

    def loss_terms(self, output: HeadOutput, scores: Scores) -> Mapping[str, Tensor]:
        state = output.kept["state"].flatten(0, 1)  # (N, C)
        weights = window_weights(scores.targets, scores.valid, state.dtype)

        def run(inputs: Sequence[Tensor], given: list[Tensor]) -> Tensor:
            return linear_cross_entropy(
                inputs[0], given[0], scores.targets.flatten(1).T, weights.flatten(1).T
            )[0]

        return {"top": opened((self.head,), (state,), run)}

    def cost(self) -> Cost:
        return Cost(own=[self.head, self.head], rows_of_trunk=True)  # of mtp_loss/k, and of L_TOP

    @classmethod
    def drafter(cls, mtp: MTPConfig) -> str:
        return "has no drafter: it ranks the tokens of a window and says of none where it is"

    @classmethod
    def export(cls, config: ModelConfig, mtp: MTPConfig) -> Export:
        return trunk_alone(mtp)


def window_weights(targets: Tensor, valid: Tensor, dtype: torch.dtype) -> Tensor:
    """(1+D, B, T), at least float32: softmax(y) of each slot, at the place where a token first
    comes; 0 elsewhere, and everywhere in a window without a valid target.

    targets, valid: (1+D, B, T) of depth 0..D.
    """
    places = len(targets)
    first = valid.clone()
    for d in range(1, places):
        first[d] &= ~((targets[:d] == targets[d]) & valid[:d]).any(0)
    wide = torch.promote_types(dtype, torch.float32)
    score = torch.arange(places - 1, -1, -1, dtype=wide, device=targets.device)  # D - d
    return score[:, None, None].where(first, float("-inf")).softmax(0).where(first, 0.0)
