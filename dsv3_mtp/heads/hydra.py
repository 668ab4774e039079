"""Hydra's heads (arXiv 2402.05109): Medusa's, each of which also reads the tokens drafted so far.

Head k on the trunk's final state h_i, E the model's embedding:

    x   = [h_i ; E(t_{i+1}) ; .. ; E(t_{i+k})]               (k+1) C wide
    x_1 = W_res x + SiLU(W_1 x),  x_j = x_{j-1} + SiLU(W_j x_{j-1})
    q_k = softmax(W_k x_n)

Hydra++ has `num_layers: 4`, `prefix: true`, which puts one decoder layer and a norm
between the trunk and all heads, and the main head's distribution as target (`mtp.objective: {kl:
1.0}`). At the start W_1 .. W_n are 0 and W_k is the main output head, as in the authors' code. Of
that code this file leaves out dropout on what the layers read, and the biases; it repeats one
and the same layer for x_2 .. x_n, here each has weights of its own. Drafts are one path, no tree.
"""

from collections.abc import Sequence
from typing import Annotated, Any, cast

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from dsv3_mtp.config import ModelConfig, MTPConfig
from dsv3_mtp.config.section import Boolean, Integer, Section
from dsv3_mtp.decode.draft import Drafter, stacked
from dsv3_mtp.decode.sample import DraftSampler
from dsv3_mtp.heads.base import Cost, Export, Head, Writable, copy_weights
from dsv3_mtp.heads.parallel import Block, ParallelDrafter, ParallelHead, trunk_alone
from dsv3_mtp.model.states import HeadInputs, HeadOutput, HeadRows, LMHead, TrunkStates
from dsv3_mtp.model.trunk import Trunk


class HydraOptions(Section):
    """Keys of `mtp:` with mode hydra."""

    num_layers: Annotated[Integer, Field(ge=1, le=64)] = 1
    """Layers of each head's MLP (arXiv 2402.05109: 1; Hydra++: 4)."""
    prefix: Boolean = False
    """One decoder layer between the trunk and the heads (Hydra++)."""


class HydraHead(nn.Module):
    """Head k: (.., (k+1) C) -> (.., V) logits."""

    def __init__(self, config: ModelConfig, depth: int, layers: int):
        super().__init__()
        width = config.hidden_size
        self.residual = nn.Linear((depth + 1) * width, width, bias=False)
        self.layers = nn.ModuleList(
            nn.Linear(width * (1 if layer else depth + 1), width, bias=False)
            for layer in range(layers)
        )
        self.lm_head = LMHead(width, config.vocab_size, bias=False)

    def read(self, parts: Sequence[Tensor]) -> Tensor:
        """The state and the k embeddings, (.., C) each -> what the output head reads, (.., C)."""
        x = torch.cat(list(parts), dim=-1)
        first, *more = self.layers
        x = self.residual(x) + F.silu(first(x))
        for layer in more:
            x = x + F.silu(layer(x))
        return x

    def forward(self, parts: Sequence[Tensor]) -> Tensor:
        return self.lm_head(self.read(parts))


class Hydra(Head):
    """D small MLPs with output heads of their own, on one state and the tokens since."""

    name = "hydra"
    Options = HydraOptions
    options: HydraOptions

    def __init__(self, config: ModelConfig, mtp: MTPConfig):
        super().__init__(config, mtp)
        self.prefix = ParallelHead(config) if self.options.prefix else None
        depths = range(1, 1 + mtp.depths)
        self.heads = nn.ModuleList(HydraHead(config, k, self.options.num_layers) for k in depths)

    def start(self, trunk: Trunk, lm_head: LMHead, writable: Writable) -> None:
        for head in cast(list[HydraHead], self.heads):
            for layer in cast(list[nn.Linear], head.layers):
                with writable(layer.weight):
                    layer.weight.zero_()
            copy_weights(lm_head, head.lm_head, writable)

    @classmethod
    def reads(cls, mtp: MTPConfig) -> frozenset[str | int]:
        return frozenset({"post_norm"})

    @classmethod
    def horizon(cls, mtp: MTPConfig, depth: int) -> int:
        return depth

    def forward(self, inputs: HeadInputs) -> HeadOutput:
        state, stats = inputs.trunk.post_norm, []
        if self.prefix is not None:
            out, routed = self.prefix(state, inputs.angles, inputs.mask)
            state, stats = self.prefix.shared_head(out), [routed]
        parts, rows = [state], []
        for depth, head in enumerate(cast(list[HydraHead], self.heads), start=1):
            parts.append(inputs.ahead(depth))
            rows.append(HeadRows((head.read(parts),), (depth,), (head.lm_head,)))
        return HeadOutput(rows, stats)

    def cost(self) -> Cost:
        heads = cast(list[HydraHead], self.heads)
        first = [part for head in heads for part in (head.residual, head.layers[0])]
        more = [layer for head in heads for layer in head.layers[1:]]
        wide = sum(k + 1 for k in range(1, 1 + len(heads)))  # what the heads read
        return Cost(
            blocks=[] if self.prefix is None else [self.prefix],
            products=more if self.prefix is None else first + more,
            first=first if self.prefix is None else [],
            own=[head.lm_head for head in heads],
            kept=self.config.hidden_size * (wide + 3 * (len(more) + len(heads))),
        )

    @classmethod
    def drafter(cls, mtp: MTPConfig) -> type[Drafter]:
        return HydraDrafter

    def decode_forms(self, model: nn.Module) -> list[Any]:
        return [] if self.prefix is None else [Block(self.prefix)]

    @classmethod
    def export(cls, config: ModelConfig, mtp: MTPConfig) -> Export:
        return trunk_alone(mtp)


class HydraDrafter(ParallelDrafter):
    """One state for all drafts; each head also reads the embeddings of those before."""

    def caches_needed(self) -> int:
        return int(self.options.prefix)

    def source(self, states: TrunkStates) -> Tensor:
        return states.post_norm

    def draft(
        self, ids: Tensor, last: Sequence[int], count: int, sampler: DraftSampler
    ) -> tuple[Tensor, Tensor | None]:
        if self.options.prefix:
            state = self.run(0, last)  # (B, C)
        else:
            state = self.rings[0].read([m - 1 for m in last], 1).squeeze(1)
        table, parts, drawn = self.model.model.embed_tokens.weight, [state], list[Any]()
        rows, end = torch.arange(len(last), device=ids.device), torch.tensor(last).to(ids.device)
        while len(drawn) < count and not sampler.ended:
            parts.append(F.embedding(ids[rows, end + len(drawn)], table))
            drawn.append(sampler.draw(self.decoder.narrow(self.model.mtp.heads[len(drawn)](parts))))
            ids[rows, end + len(drawn)] = drawn[-1][0]
        return stacked(drawn)
