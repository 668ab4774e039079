"""Kinds of heads that exist for the tests alone: what the protocol allows beyond the package's own.

They are named in a config as a stranger's would be: `mtp.mode: tests.example_heads:InnerHead`.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsv3_mtp.config import ModelConfig, MTPConfig
from dsv3_mtp.config.section import Fraction, NotNegative, Section
from dsv3_mtp.decode.draft import Drafter
from dsv3_mtp.heads.base import Cost, Head, Writable, copy_weights
from dsv3_mtp.heads.parallel import Parallel, ParallelDrafter
from dsv3_mtp.model.layers import RMSNorm
from dsv3_mtp.model.states import HeadInputs, HeadOutput, HeadRows, LMHead, Output, Scores
from dsv3_mtp.model.trunk import Trunk


class ConfidenceOptions(Section):
    confidence: NotNegative = 0.5
    regression: NotNegative = 0.2
    entropy: NotNegative = 0.1
    noise: Fraction = 0.25


class ConfidenceHead(Parallel):
    """Parallel heads that start as the trunk's last layer, with three losses of their own: a guess
    whether the own argmax is right, the distance to the trunk's state that many slots later, and
    the entropy of depth 1 by the shared output head.

    And noise on the hidden states that the guess reads, while it trains: it draws random numbers.
    """

    name = None
    Options = ConfidenceOptions

    def __init__(self, config: ModelConfig, mtp: MTPConfig):
        super().__init__(config, mtp)
        self.guesses = nn.ModuleList(
            nn.Linear(config.hidden_size, 1, bias=False) for _ in range(mtp.depths)
        )

    def forward(self, inputs: HeadInputs) -> HeadOutput:
        output, guesses = super().forward(inputs), []
        for depth, (rows, guess) in enumerate(zip(output.rows, self.guesses, strict=True), 1):
            hidden = rows.inputs[0]
            if self.training:
                kept = inputs.uniform(depth) >= self.options.noise
                hidden = hidden * kept.unsqueeze(-1)
            guesses.append(guess(hidden).squeeze(-1))
        off = []
        for depth, rows in enumerate(output.rows, 1):
            aim, _ = inputs.later(inputs.trunk.post_norm.detach(), depth)
            off.append(F.smooth_l1_loss(rows.inputs[0], aim, reduction="none").mean(-1))
        kept = {"guess": torch.stack(guesses), "off": torch.stack(off)}  # (D, B, T)
        return HeadOutput(output.rows, output.stats, kept)

    def start(self, trunk: Trunk, lm_head: LMHead, writable: Writable) -> None:
        for layer in self.layers:
            copy_weights(trunk.norm, layer.shared_head.norm, writable)  # type: ignore[union-attr]
            for name, part in trunk.layers[-1].named_children():
                copy_weights(part, getattr(layer, name), writable)

    @classmethod
    def reads(cls, mtp: MTPConfig) -> frozenset[str | int]:
        return frozenset({"last_input", "post_norm"})

    @classmethod
    def terms(cls, mtp: MTPConfig) -> dict[str, float]:
        return {
            name: getattr(mtp.options, name) for name in ("confidence", "regression", "entropy")
        }

    @classmethod
    def count_terms(cls, mtp: MTPConfig, valid: Tensor, taught: Tensor) -> Tensor:
        return torch.stack([valid[1:].sum(), taught.sum(), valid[1].sum()])

    def loss_terms(self, output: HeadOutput, scores: Scores) -> dict[str, Tensor]:
        right = (scores.prediction == scores.targets)[1:]
        guess, valid = output.kept["guess"], scores.valid[1:]
        loss = F.binary_cross_entropy_with_logits(guess, right.to(guess), reduction="none")
        (first,) = [rows for rows in output.rows if rows.depths == (1,)]
        log_q = first.logits().log_softmax(-1)
        return {
            "confidence": (loss * valid).sum(),
            "regression": (output.kept["off"] * scores.taught).sum(),
            "entropy": (log_q.exp() * log_q).sum(-1)[scores.valid[1]].sum(),
        }

    def cost(self) -> Cost:
        cost = super().cost()
        return Cost(cost.blocks, list(self.guesses), cost.shared + 1)  # depth 1 twice


class BiasedHead(Head):
    """The trunk's state and a bias by a token before the target: logits that are no product with
    the shared head alone. Depth k reads t_{i+k} and nothing between, and predicts t_{i+2k+1}.
    """

    def __init__(self, config: ModelConfig, mtp: MTPConfig):
        super().__init__(config, mtp)
        self.norms = nn.ModuleList(
            RMSNorm(config.hidden_size, config.rms_norm_eps) for _ in range(mtp.depths)
        )
        self.bias = nn.ModuleList(Bias(config) for _ in range(mtp.depths))

    @classmethod
    def reads(cls, mtp: MTPConfig) -> frozenset[str | int]:
        return frozenset({"pre_norm"})

    @classmethod
    def offset(cls, mtp: MTPConfig, depth: int) -> int:
        return 2 * depth + 1

    @classmethod
    def horizon(cls, mtp: MTPConfig, depth: int) -> int:
        return depth

    def forward(self, inputs: HeadInputs) -> HeadOutput:
        state, rows = inputs.trunk.pre_norm, []
        for depth, (norm, bias) in enumerate(zip(self.norms, self.bias, strict=True), 1):
            rows.append(
                HeadRows((norm(state), inputs.ahead(depth)), (depth,), (inputs.lm_head, bias))
            )
        return HeadOutput(rows)

    def cost(self) -> Cost:
        return Cost(products=list(self.bias), shared=self.mtp.depths)

    @classmethod
    def drafter(cls, mtp: MTPConfig) -> "type[Drafter] | str":
        return "has no drafter: it is there for its logits"


class Bias(Output):
    """logits = hidden @ head + (embedding @ down) @ up."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.down = nn.Parameter(torch.empty(4, config.hidden_size))
        self.up = nn.Parameter(torch.empty(config.vocab_size, 4))

    def logits(self, inputs: Any, weights: Any) -> Tensor:
        (hidden, before), (head, down, up) = inputs, weights
        return hidden @ head.T + before @ down.T @ up.T


class InnerHead(Parallel):
    """Parallel heads on the output of trunk layer 0: what pipeline stages cannot give it."""

    name = None

    @classmethod
    def reads(cls, mtp: MTPConfig) -> frozenset[str | int]:
        return frozenset({0})

    def forward(self, inputs: HeadInputs) -> HeadOutput:
        trunk = inputs.trunk._replace(last_input=inputs.trunk.layers[0])
        return super().forward(HeadInputs(**{**vars(inputs), "trunk": trunk}))

    @classmethod
    def drafter(cls, mtp: MTPConfig) -> type[Drafter]:
        return InnerDrafter


class InnerDrafter(ParallelDrafter):
    def source(self, states: Any) -> Tensor:
        return states.layers[0]
