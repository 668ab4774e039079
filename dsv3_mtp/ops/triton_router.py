"""The router of DeepSeekMoE as two Triton kernels: model/moe.py has the same in torch's operations,
some forty of them. One program takes a few tokens of one sequence, with all their experts.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 1024  # scores that a program takes, at least those of one token
LOWEST = tl.constexpr(-1.0e38)  # twice it is still a float32


class Routing(NamedTuple):
    """Of B sequences of T tokens, N = B*T."""

    chosen: Tensor  # (N, K) int64, the best score + bias first
    gates: Tensor  # (N, K) float32
    load: Tensor  # (E,) float32: tokens that chose each expert
    hits: Tensor  # (B, E) float32: tokens that have it among their K best without bias and groups
    share: Tensor  # (B, E) float32: sum over the tokens of its part of a token's scores
    nodes: Tensor  # scalar int64: sum over tokens of the groups that their experts lie in


def route(
    logits: Tensor,
    bias: Tensor,
    *,
    n_group: int,
    topk_group: int,
    num_experts_per_tok: int,
    norm_topk_prob: bool,
    routed_scaling_factor: float,
) -> Routing:
    """logits: (B, T, E) float32; bias: (E,) float32; the rest are keys of ModelConfig. Gradients
    flow from gates and share.

    Raises:
        ValueError: another type or shape.
    """
    experts = logits.shape[-1]
    for name, tensor, shape in (("logits", logits, logits.shape), ("bias", bias, (experts,))):
        if tensor.dtype != torch.float32 or tensor.shape != shape:
            got = f"{tensor.dtype} of shape {tuple(tensor.shape)}"
            raise ValueError(f"{name}: must be float32 of shape {tuple(shape)} (got {got})")
    if logits.ndim != 3 or experts % n_group:
        raise ValueError(
            f"logits: must be (B, T, E), E a multiple of {n_group} groups "
            f"(got {tuple(logits.shape)})"
        )
    factors = {"NORM": norm_topk_prob, "FACTOR": routed_scaling_factor}
    groups = {"GROUPS": n_group, "TOP_GROUPS": topk_group}
    inputs = logits.contiguous(), bias.contiguous(), num_experts_per_tok
    return Routing(*_Route.apply(*inputs, groups, factors))


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits: Tensor, bias: Tensor, top_k: int, groups: dict, factors: dict):
        (batch, length, experts), tile = logits.shape, _tile(logits.shape[-1])
        blocks = triton.cdiv(length, tile["ROWS"])
        chosen = torch.empty(batch * length, top_k, dtype=torch.int64, device=logits.device)
        gates = logits.new_empty(batch * length, top_k)
        sums = logits.new_empty(3, batch, blocks, experts)  # load, hits, share
        nodes = torch.empty(batch, blocks, dtype=torch.int64, device=logits.device)
        if logits.numel():
            _route[batch, blocks](
                logits, bias, chosen, gates, sums, nodes, length,
                E=experts, K=top_k, K_BLOCK=triton.next_power_of_2(top_k), **groups, **factors,
                **tile,
            )  # fmt: skip
        ctx.save_for_backward(logits, chosen)
        ctx.factors = factors
        load, hits, share = sums.sum(2)
        result = chosen, gates, load.sum(0), hits, share, nodes.sum()
        ctx.mark_non_differentiable(*(result[n] for n in (0, 2, 3, 5)))
        return result

    @staticmethod
    def backward(ctx, _chosen, grad_gates: Tensor, _load, _hits, grad_share: Tensor, _nodes):
        logits, chosen = ctx.saved_tensors
        grad, (batch, length, experts) = torch.empty_like(logits), logits.shape
        tile = _tile(experts)
        if logits.numel():
            _route_backward[batch, triton.cdiv(length, tile["ROWS"])](
                logits, chosen, grad_gates.contiguous(), grad_share.contiguous(), grad, length,
                E=experts, K=chosen.shape[1], **ctx.factors, **tile,
            )  # fmt: skip
        return grad, None, None, None, None


def _tile(experts: int) -> dict[str, int]:
    block = triton.next_power_of_2(experts)
    return {"BLOCK": block, "ROWS": max(1, TILE // block)}


@triton.jit
def _groups_of(taken, group, GROUPS: tl.constexpr, ROWS: tl.constexpr):
    """How many groups the taken experts of each token lie in, (ROWS, 1)."""
    used = tl.zeros([ROWS, 1], tl.int64)
    for g in range(GROUPS):
        used += tl.max((taken & (group == g)).to(tl.int64), 1)[:, None]
    return used


@triton.jit
def _route(
    logits, bias, chosen, gates, sums, nodes, length,
    E: tl.constexpr, GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr, K: tl.constexpr,
    K_BLOCK: tl.constexpr, NORM: tl.constexpr, FACTOR: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    sequence, block = tl.program_id(0), tl.program_id(1)
    slot = block * ROWS + tl.arange(0, ROWS)[:, None]
    token = sequence.to(tl.int64) * length + slot
    e, k = tl.arange(0, BLOCK)[None, :], tl.arange(0, K_BLOCK)[None, :]
    there, known = slot < length, e < E
    inside = there & known
    group: tl.constexpr = E // GROUPS  # experts of one
    scores = tl.sigmoid(tl.load(logits + token * E + e, inside, other=0.0))
    # never an expert twice, whatever is nan: -inf is not there or taken already, LOWEST any other
    biased = scores + tl.load(bias + e, known, other=0.0)
    biased = tl.where(biased == biased, biased, LOWEST)
    biased = tl.where(known, biased, float("-inf"))
    if GROUPS > 1:
        allowed = tl.zeros([ROWS, BLOCK], tl.int1)
        ranked = tl.full([ROWS, BLOCK], float("-inf"), tl.float32)  # column g: group g
        for g in range(GROUPS):
            mine = tl.where(e // group == g, biased, float("-inf"))
            first = tl.max(mine, 1)[:, None]
            mine = tl.where(e == tl.argmax(mine, 1)[:, None], float("-inf"), mine)
            second = tl.max(mine, 1)[:, None]
            ranked = tl.where(e == g, first + second, ranked)
        for _ in range(TOP_GROUPS):
            winner = tl.argmax(ranked, 1)[:, None]
            allowed = allowed | (e // group == winner)
            ranked = tl.where(e == winner, float("-inf"), ranked)
        biased = tl.where(allowed | (e >= E), biased, LOWEST)
    taken = tl.zeros([ROWS, BLOCK], tl.int1)
    index = tl.zeros([ROWS, K_BLOCK], tl.int64)
    gate = tl.zeros([ROWS, K_BLOCK], tl.float32)
    plain = tl.where(scores == scores, scores, LOWEST)
    hit = tl.zeros([ROWS, BLOCK], tl.int1) | (e >= E)
    for n in range(K):
        best = tl.argmax(tl.where(taken, float("-inf"), biased), 1)[:, None]
        taken = taken | (e == best)
        index = tl.where(k == n, best.to(tl.int64), index)
        gate = tl.where(k == n, tl.sum(tl.where(e == best, scores, 0.0), 1)[:, None], gate)
        hit = hit | (e == tl.argmax(tl.where(hit, float("-inf"), plain), 1)[:, None])
    if NORM:
        gate = gate / (tl.sum(gate, 1)[:, None] + 1e-20)
    tl.store(chosen + token * K + k, index, there & (k < K))
    tl.store(gates + token * K + k, gate * FACTOR, there & (k < K))
    scores = tl.where(known, scores, 0.0)
    share = scores / tl.sum(scores, 1)[:, None]
    # of load, hits and share, (sequences, blocks, E) each
    at = (sequence * tl.num_programs(1) + block).to(tl.int64) * E + tl.arange(0, BLOCK)
    plane = tl.num_programs(0).to(tl.int64) * tl.num_programs(1) * E
    whole = tl.arange(0, BLOCK) < E
    tl.store(sums + at, tl.sum((taken & there).to(tl.float32), 0), whole)
    tl.store(sums + plane + at, tl.sum((hit & there).to(tl.float32), 0), whole)
    tl.store(sums + 2 * plane + at, tl.sum(tl.where(there, share, 0.0), 0), whole)
    total = tl.sum(tl.where(there, _groups_of(taken, e // group, GROUPS, ROWS), 0))
    tl.store(nodes + sequence * tl.num_programs(1) + block, total)


@triton.jit
def _route_backward(
    logits, chosen, grad_gates, grad_share, grad, length,
    E: tl.constexpr, K: tl.constexpr, NORM: tl.constexpr, FACTOR: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    sequence = tl.program_id(0)
    slot = tl.program_id(1) * ROWS + tl.arange(0, ROWS)[:, None]
    token = sequence.to(tl.int64) * length + slot
    e = tl.arange(0, BLOCK)[None, :]
    there, known = slot < length, e < E
    inside = there & known
    scores = tl.where(known, tl.sigmoid(tl.load(logits + token * E + e, inside, other=0.0)), 0.0)
    slope = tl.zeros([ROWS, BLOCK], tl.float32)  # of the gates, in place of their experts
    taken = tl.zeros([ROWS, BLOCK], tl.int1)
    for n in range(K):
        mine = e == tl.load(chosen + token * K + n, there, other=-1)
        taken = taken | mine
        slope += tl.where(mine, tl.load(grad_gates + token * K + n, there, other=0.0), 0.0) * FACTOR
    if NORM:
        total = tl.sum(tl.where(taken, scores, 0.0), 1)[:, None] + 1e-20
        drawn = tl.sum(slope * scores, 1)[:, None] / total
        slope = tl.where(taken, (slope - drawn) / total, 0.0)
    balance = tl.load(grad_share + sequence * E + e, known, other=0.0)
    total = tl.sum(scores, 1)[:, None]
    slope += (balance - tl.sum(balance * scores, 1)[:, None] / total) / total
    tl.store(grad + token * E + e, slope * scores * (1 - scores), inside)
