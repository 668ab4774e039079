"""Sequence parallelism after DeepSpeed-Ulysses (arXiv 2309.14509): the slots of a row divided over
a group of ranks.

With parallel.sequence_parallel_size = S, each S ranks that follow each other are given the same
rows, of T slots, and rank s keeps slots [s*T/S, (s+1)*T/S) with the 1+D tokens ahead of them: depth
k of its last slot then finds its input and its target there, and needs nothing of a neighbour. All
but four things look at one slot at a time:

    attention       between two all-to-alls a rank has all slots of H/S heads
    document mask   of whole rows, from the document numbers of all shards
    balance loss    f of the whole row; P, which has the gradient, as a sum of shards (model/moe.py)
    agreement       depth k of a slot against the main head k slots on, perhaps in a later shard

DeepSpeed is told nothing. It sees data parallelism over all ranks of a stage and averages their
gradients; each loss is normalized for that, and ZeRO, expert parallelism and checkpoints work as
without shards.
"""

from typing import Any

import torch
import torch.distributed as dist
from deepspeed.sequence.layer import DistributedAttention
from torch import Tensor

from dsv3_mtp.ops.attention import Core, sdpa
from dsv3_mtp.ops.compute import Shard
from dsv3_mtp.parallel.launch import World


class SequenceShard(Shard):
    """This rank's shard of every row, and the group of ranks that have the others."""

    def __init__(self, number: int, count: int, group: Any):
        self.number, self.count, self.group = number, count, group

    @torch.no_grad()
    def gather(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        parts = [torch.empty_like(x) for _ in range(self.count)]
        dist.all_gather(parts, x, group=self.group)
        return torch.cat(parts, dim=1)

    def beyond(self, count: int) -> int:
        return count if self.number + 1 < self.count else 0

    def following(self, x: Tensor, count: int) -> Tensor:
        return _Following.apply(x, self, count)

    def attention(self, core: Core | None) -> Core:
        """A core for this shard's slots and all heads, around one for all slots and H/S heads."""
        whole = core or sdpa

        def whole_rows(
            query: Tensor, key: Tensor, value: Tensor, scale: float, first: Tensor | None
        ) -> Tensor:
            return whole(
                query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), scale, first
            ).transpose(1, 2)

        exchange = DistributedAttention(whole_rows, self.group, scatter_idx=2, gather_idx=1)  # H, T

        def sharded(
            query: Tensor, key: Tensor, value: Tensor, scale: float, first: Tensor | None
        ) -> Tensor:
            parts = [x.transpose(1, 2) for x in (query, key, value)]  # (B, T/S, H, width)
            # 0 is B; rotated already
            return exchange(*parts, 0, None, scale, first).transpose(1, 2)

        return sharded


class _Following(torch.autograd.Function):
    """`SequenceShard.following`. Every rank calls it, and its backward, at the same place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shard: SequenceShard, count: int) -> Tensor:
        ctx.shard, ctx.count, ctx.shape = shard, count, x.shape
        # (B, S * count, ..): of each shard as many as are wanted
        first = shard.gather(x[:, :count])
        begin = (shard.number + 1) * count
        return first[:, begin : begin + shard.beyond(count)]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        shard, count = ctx.shard, ctx.count
        sent = grad.new_zeros(len(grad), count, *grad.shape[2:])
        sent[:, : grad.shape[1]] = grad
        received = shard.gather(sent)  # (B, S * count, ..): what each rank has for the next one
        back = grad.new_zeros(ctx.shape)
        if shard.number:
            back[:, :count] = received[:, (shard.number - 1) * count : shard.number * count]
        return back, None, None


def shard_of(world: World) -> Shard:
    """What of each row this rank is given. All ranks call it together: it makes their groups."""
    count = world.slices
    if count == 1:
        return Shard()
    groups = [dist.new_group(range(first, first + count)) for first in range(0, world.size, count)]
    return SequenceShard(world.rank % count, count, groups[world.rank // count])
