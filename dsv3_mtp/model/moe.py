"""DeepSeekMoE, balanced by a bias instead of an auxiliary loss (V3 2.1.2, eqs. 12-20)."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dsv3_mtp.config import ModelConfig
from dsv3_mtp.model.layers import MLP
from dsv3_mtp.ops import c, choice
from dsv3_mtp.ops.compute import given
from dsv3_mtp.ops.router import router_logits
from dsv3_mtp.precision.stored import kept

Beside = Callable[[Tensor], Tensor]  # (N, C) -> (N, C)


class RouterStats(NamedTuple):
    """What a router did in a forward. Returned, so that recomputation cannot count it twice."""

    load: Tensor  # (E,) float32: tokens sent to each expert, no gradient
    # scalar: sum over the B sequences of sum_i f_i P_i (eq. 17 before alpha), with gradient
    balance: Tensor
    # scalar int64: sum over tokens of the groups (V3: nodes) that the token's experts lie in
    nodes: Tensor

    def __add__(self, other):
        return RouterStats(*(a + b for a, b in zip(self, other, strict=True)))


def count(chosen: Tensor, experts: int) -> Tensor:
    """(N, K) -> (E,) int64: pairs that chose each expert. Not bincount: CUDA's host would wait."""
    return chosen.new_zeros(experts).scatter_add(
        0, chosen.flatten(), torch.ones_like(chosen).flatten()
    )


class Gate(nn.Module):
    """Sigmoid router: experts chosen by score + bias in the best groups, gated by the score."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config, self.shard = config, given().shard
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        self.e_score_correction_bias: Tensor  # float32 and no gradient: moved by `update_bias`
        self.register_buffer(
            "e_score_correction_bias", torch.zeros(config.n_routed_experts, dtype=torch.float32)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, RouterStats]:
        """x: (B, T, C) -> chosen experts (N, K) int64, gates (N, K) float32, stats."""
        logits = router_logits(x, self.weight)  # (B, T, E)
        if (kernels := choice.kernels(logits)) is not None and kernels is not c:
            return self.by_kernel(kernels.route, logits)
        scores = logits.sigmoid()
        flat = scores.flatten(0, 1)  # (N, E)
        chosen = self.choose(flat.detach())  # (N, K)
        stats = RouterStats(
            count(chosen, flat.shape[1]).float(),
            self.balance_loss(scores),
            self.count_nodes(chosen),
        )
        return chosen, self.weigh(flat, chosen), stats

    def by_kernel(self, route: Callable, logits: Tensor) -> tuple[Tensor, Tensor, RouterStats]:
        """What `forward` returns, of logits (B, T, E)."""
        config = self.config
        found = route(
            logits,
            self.e_score_correction_bias,
            n_group=config.n_group,
            topk_group=config.topk_group,
            num_experts_per_tok=config.num_experts_per_tok,
            norm_topk_prob=config.norm_topk_prob,
            routed_scaling_factor=config.routed_scaling_factor,
        )
        length = logits.shape[1]
        balance = self.balance(found.hits / length, found.share / length)
        return found.chosen, found.gates, RouterStats(found.load, balance, found.nodes)

    def weigh(self, scores: Tensor, chosen: Tensor) -> Tensor:
        """scores: (N, E); chosen: (N, K) -> gates (N, K): chosen scores, normalised and scaled."""
        gates = scores.gather(1, chosen)
        if self.config.norm_topk_prob:
            gates = gates / (gates.sum(-1, keepdim=True) + 1e-20)
        return gates * self.config.routed_scaling_factor

    def choose(self, scores: Tensor) -> Tensor:
        """Top-K of score + bias in the `topk_group` groups whose best two such sum highest."""
        config = self.config
        biased = scores + self.e_score_correction_bias  # (N, E)
        if config.n_group > 1:
            groups = biased.unflatten(1, (config.n_group, -1))  # (N, G, E/G)
            # (N, topk_group)
            best = groups.topk(2, dim=-1).values.sum(-1).topk(config.topk_group, dim=-1).indices
            allowed = torch.zeros_like(groups[..., 0], dtype=torch.bool).scatter_(1, best, True)
            biased = groups.masked_fill(~allowed.unsqueeze(-1), float("-inf")).flatten(1)
        return biased.topk(config.num_experts_per_tok, dim=-1, sorted=False).indices

    def count_nodes(self, chosen: Tensor) -> Tensor:
        """Messages between nodes, which are groups: `topk_group` per token at most (V3 2.1.2)."""
        groups = self.config.n_group
        used = chosen.new_zeros(chosen.shape[0], groups)
        return used.scatter_(1, chosen // (self.config.n_routed_experts // groups), 1).sum()

    def balance_loss(self, scores: Tensor) -> Tensor:
        """Sequence-wise balance (eqs. 17-20) summed over the batch, of scores (B, T, E)."""
        top = scores.detach().topk(self.config.num_experts_per_tok, dim=-1).indices  # (B, T, K)
        hits = torch.zeros_like(scores).scatter_(2, top, 1.0)  # (B, T, E)
        return self.balance(hits.mean(1), (scores / scores.sum(-1, keepdim=True)).mean(1))

    def balance(self, hits: Tensor, share: Tensor) -> Tensor:
        """hits: (B, E), part of the tokens with the expert in their unbiased top K, as printed;
        share: (B, E), mean over the tokens of its part of their scores -> scalar.

        Of rows in shards: f of the whole row, P this shard's part of the row's mean, so that shards
            add up.
        """
        hits = self.shard.gather(hits.unsqueeze(1)).mean(1)  # (B, E)
        # (B, E), 1 when balanced
        frequency = hits * (share.shape[1] / self.config.num_experts_per_tok)
        return (frequency * share).sum() / self.shard.count

    @torch.no_grad()
    def update_bias(self, load: Tensor, speed: float) -> None:
        """b_i += speed * sign(mean load - load_i), once per optimizer step on the load of the whole
        global batch.

        load: (E,) summed over micro-batches and ranks (V3 section 2.1.2; arXiv 2408.15664).
        """
        self.e_score_correction_bias += speed * torch.sign(load.mean() - load).to(
            self.e_score_correction_bias
        )


class Experts(nn.Module):
    """E SwiGLU experts, stacked in memory. Each runs in every step, on zero rows if need be."""

    def __init__(self, config: ModelConfig, *, count: int | None = None):
        """count: how many of the layer's experts; None: all."""
        nn.Module.__init__(self)
        experts = config.n_routed_experts if count is None else count
        hidden, width = config.hidden_size, config.moe_intermediate_size
        # number of the first expert here; parallel/experts.py keeps a part of the layer's
        self.first, self.routed = 0, given().routed()
        self.gate_up_proj: Tensor  # (E, 2F, C), gate rows first
        self.down_proj: Tensor  # (E, C, F)
        given().stack(self, "gate_up_proj", (experts, 2 * width, hidden), 2)
        given().stack(self, "down_proj", (experts, hidden, width), 1)

    def forward(
        self, x: Tensor, chosen: Tensor, gates: Tensor, counts: Tensor, beside: Beside | None = None
    ) -> Tensor:
        """Sum over the K chosen experts of gate * expert(x), plus beside(x).

        x: (N, C); chosen, gates: (N, K); counts: (E,). beside: another (N, C) -> (N, C), which may
        be computed while tokens travel between ranks.
        """
        gate_up, down = (kept(self, name, x.dtype) for name in ("gate_up_proj", "down_proj"))
        y = self.routed(x, gates, gate_up, down, chosen, counts)
        return y if beside is None else y + beside(x)


class MoE(nn.Module):
    """y = shared(x) + sum over the K chosen experts of gate * expert(x). Dropless."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate = Gate(config)
        self.experts = (given().experts or Experts)(config)
        shared = config.n_shared_experts * config.moe_intermediate_size
        self.shared_experts = MLP(config.hidden_size, shared, "shared_experts") if shared else None

    def forward(self, x: Tensor) -> tuple[Tensor, RouterStats]:
        """x: (B, T, C) -> (B, T, C), stats."""
        chosen, gates, stats = self.gate(x)  # (N, K)
        rows, counts = x.flatten(0, 1), stats.load.long()
        y = self.experts(rows, chosen, gates, counts, self.shared_experts)
        return y.view_as(x), stats
