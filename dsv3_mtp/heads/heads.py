"""The extra prediction heads behind one interface: sequential (DeepSeek-V3), parallel (Meta),
parallel linear.

Every head class maps the trunk's states to D hidden states, ready for an output head:
    forward(trunk, embeddings, angles, mask) -> [hidden of depth 1..D, each (B, T, C)], [stats of
    each router]
Slot i of depth k predicts token t_{i+k+1}. Positions are the anchor's (slot i's own) at every
depth.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dsv3_mtp.config import ModelConfig, MTPConfig
from dsv3_mtp.model.block import DecoderLayer
from dsv3_mtp.model.layers import RMSNorm
from dsv3_mtp.ops.compute import given
from dsv3_mtp.ops.cross_entropy import linear_cross_entropy


class TrunkStates(NamedTuple):
    """What heads may read, each (B, T, C)."""

    last_input: (
        Tensor  # input of the trunk's last layer: what Meta's heads share, that layer being head 1
    )
    pre_norm: Tensor  # output of the trunk's last layer
    post_norm: Tensor  # after the trunk's final norm: what the main output head reads

    def detach(self) -> "TrunkStates":
        return TrunkStates(*(state.detach() for state in self))


class LMHead(nn.Linear):
    """Output head. The loss is computed inside its own forward, so that ZeRO-3 finds the weight
    gathered.
    """

    def forward(
        self,
        hidden: Tensor,
        targets: Tensor | None = None,
        row_weight: Tensor | None = None,
        detach: bool = False,
    ) -> Any:
        """hidden (..., C) -> logits (..., V); with targets (M,) and row_weight (M,) -> loss, nll,
        prediction.
        """
        if targets is None or row_weight is None:
            return super().forward(hidden)
        return linear_cross_entropy(
            hidden, self.weight.detach() if detach else self.weight, targets, row_weight
        )


class SharedHead(nn.Module):
    """The norm in front of the shared output head; every module owns one (`shared_head.norm` in
    checkpoints).
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


class MTPModule(DecoderLayer):
    """DeepSeek-V3's module k (eqs. 21-23): merge the previous hidden state with the token k ahead,
    one block.

        h'_k = eh_proj([enorm(Emb(t_{i+k})) ; hnorm(h_{k-1})])
        h_k  = Block(h'_k), read through shared_head.norm

    The embedding half comes FIRST in eh_proj, as in all released weights and engines; the paper's
    eq. 21 writes it second. The two differ by a permutation of eh_proj's columns. With `embed:
    false` (ablation) eh_proj is (C, C) and reads the hidden half alone.
    """

    def __init__(self, config: ModelConfig, mtp: MTPConfig):
        # same kind as the trunk's last layer
        super().__init__(config, layer=config.num_hidden_layers - 1)
        self.enorm = RMSNorm(config.hidden_size, config.rms_norm_eps) if mtp.embed else None
        self.hnorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        inputs = config.hidden_size * (2 if mtp.embed else 1)
        self.eh_proj = given().linear("eh_proj", inputs, config.hidden_size)
        self.shared_head = SharedHead(config)

    def merge(self, hidden: Tensor, embedding: Tensor) -> Tensor:
        """hidden h_{k-1} and embedding of t_{i+k}, both (B, T, C) -> h'_k (B, T, C)."""
        parts = (
            [self.hnorm(hidden)]
            if self.enorm is None
            else [self.enorm(embedding), self.hnorm(hidden)]
        )
        return self.eh_proj(torch.cat(parts, dim=-1))


class SequentialMTP(nn.Module):
    """The causal chain: module k reads module k-1 (`chain: hidden`) or always the trunk (`chain:
    trunk`).

    `share_weights` recycles one module D times. The state fed at k=1 and the state chained are of
    the same stage:
    both normed (`trunk_hidden: post_norm`) or both not (`pre_norm`).
    """

    def __init__(self, config: ModelConfig, mtp: MTPConfig):
        super().__init__()
        self.mtp = mtp
        self.layers = nn.ModuleList(
            MTPModule(config, mtp) for _ in range(1 if mtp.share_weights else mtp.depths)
        )

    def forward(
        self, trunk: TrunkStates, embeddings: list[Tensor], angles: Tensor, mask: Tensor | None
    ):
        normed = self.mtp.trunk_hidden == "post_norm"
        trunk_hidden = trunk.post_norm if normed else trunk.pre_norm
        hidden, outputs, stats = trunk_hidden, [], []
        for depth, embedding in enumerate(embeddings, start=1):
            module: Any = self.layers[min(depth, len(self.layers)) - 1]
            source = hidden if self.mtp.chain == "hidden" else trunk_hidden
            out, routed = module(module.merge(source, embedding), angles, mask)
            outputs.append(module.shared_head(out))
            hidden = outputs[-1] if normed else out
            stats.append(routed)
        # one router: its D forwards count once in the balance loss
        if self.mtp.share_weights and stats[0] is not None:
            total = sum(stats[1:], start=stats[0])
            stats = [total._replace(balance=total.balance / len(embeddings))]
        return outputs, stats


class ParallelHead(DecoderLayer):
    """One of Meta's extra heads (arXiv 2404.19737): a transformer layer and a norm; no embedding,
    no projection.
    """

    def __init__(self, config: ModelConfig):
        super().__init__(config, layer=config.num_hidden_layers - 1)
        self.shared_head = SharedHead(config)


class ParallelMTP(nn.Module):
    """D independent heads beside the trunk's last layer, all reading that layer's input; shared
    output head.
    """

    def __init__(self, config: ModelConfig, mtp: MTPConfig):
        super().__init__()
        self.layers = nn.ModuleList(ParallelHead(config) for _ in range(mtp.depths))

    def forward(
        self, trunk: TrunkStates, embeddings: list[Tensor], angles: Tensor, mask: Tensor | None
    ):
        outputs, stats = [], []
        for head in self.layers:
            out, routed = head(trunk.last_input, angles, mask)
            outputs.append(head.shared_head(out))  # type: ignore[operator]
            stats.append(routed)
        return outputs, stats


class ParallelLinearMTP(nn.Module):
    """D bare linear vocabulary heads on the trunk's normed output (lingua's variant, not Meta's
    transformer heads).
    """

    def __init__(self, config: ModelConfig, mtp: MTPConfig):
        super().__init__()
        self.heads = nn.ModuleList(
            LMHead(config.hidden_size, config.vocab_size, bias=False) for _ in range(mtp.depths)
        )

    def forward(
        self, trunk: TrunkStates, embeddings: list[Tensor], angles: Tensor, mask: Tensor | None
    ):
        return [trunk.post_norm] * len(self.heads), []


# By `mtp.mode`, of which "none" has none.
HEADS: dict[str, type[nn.Module]] = {
    "sequential": SequentialMTP,
    "parallel": ParallelMTP,
    "parallel_linear": ParallelLinearMTP,
}
