"""Expert parallelism: the experts of a layer divided over a group of ranks, each token sent to
where its experts are.

DeepSpeed's groups (deepspeed.utils.groups): with R ranks and parallel.expert_parallel_size = P,
ranks [0..P) hold one copy of all experts, [P..2P) the next; rank r holds experts [r % P * E/P ...)
and shares them with the R/P ranks of the same r % P. Experts are in the order of their groups, and
ranks in the order of their nodes: V3's groups are nodes.
"""

from typing import Any

import deepspeed.moe.layer
import torch
import torch.distributed as dist
from torch import Tensor, nn

from dsv3_mtp.model.moe import Experts, MoE
from dsv3_mtp.parallel import private


class LocalExperts(Experts, deepspeed.moe.layer.MoE):
    """This rank's experts of a layer, with the interface of all of them.

    Dropless: every token reaches its experts, however uneven the load. A rank that gets no row
    takes part all the same, and its experts get zero gradients.

    Being one of DeepSpeed's MoE layers is what makes DeepSpeed reduce the gradients of parameters
    with allreduce=False over the ranks that hold copies of them, divide by all ranks, and count
    every expert once in the gradient norm.
    """

    def __init__(self, whole: Experts, size: int):
        # not DeepSpeed's, which would build a router and experts of its own
        nn.Module.__init__(self)
        self.group_name = f"ep_size_{size}"
        self.group, place = private.expert_group(self.group_name)
        self.num_experts = len(whole.down_proj)  # of the whole layer
        count = self.num_experts // size
        self.first = place * count
        for name, parameter in whole.named_parameters():
            self.register_parameter(
                name, nn.Parameter(parameter.new_empty(count, *parameter.shape[1:]))
            )

    def mark(self) -> None:
        """To be called once the parameters have storage: materialising makes new ones without
        attributes.
        """
        for parameter in self.parameters():
            parameter.allreduce, parameter.group_name = False, self.group_name  # type: ignore[attr-defined]

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        """DeepSpeed asks for the groups, which are there already."""

    def forward(self, x: Tensor, chosen: Tensor, gates: Tensor, counts: Tensor) -> Tensor:
        """`Experts.forward` for this rank's tokens, with the experts of all ranks of the group.

        A token travels once to each rank that has experts of it, and the sum of their outputs once
        back. x: (N, C); chosen, gates: (N, K); counts: (E,), of which only its length counts -> (N,
        C).
        """
        local = len(self.down_proj)
        home = chosen // local  # (N, K) rank of each choice
        wanted = chosen.new_zeros(len(x), len(counts) // local).scatter_(1, home, 1)  # (N, ranks)
        rank, token = wanted.T.nonzero(as_tuple=True)  # (M,) each, sorted by rank
        leaving = wanted.sum(0)
        arriving = torch.empty_like(leaving)
        dist.all_to_all_single(arriving, leaving, group=self.group)
        send, receive = torch.stack([leaving, arriving]).tolist()
        # (M, K) which of its choices a row is sent for
        there = home.index_select(0, token) == rank.unsqueeze(1)
        numbers = torch.where(there, chosen.index_select(0, token) % local, -1)

        # (rows, K) of this rank's experts
        numbers = _Exchange.apply(numbers, send, receive, self.group)
        weights = _Exchange.apply(gates.index_select(0, token), send, receive, self.group)
        rows = _Exchange.apply(x.index_select(0, token), send, receive, self.group)  # (rows, C)
        row, slot = (numbers >= 0).nonzero(as_tuple=True)  # (pairs,) each
        expert = numbers[row, slot]
        load = torch.bincount(expert, minlength=local)
        out = super().forward(
            rows.index_select(0, row), expert.unsqueeze(1), weights[row, slot].unsqueeze(1), load
        )
        back = _Exchange.apply(_add_rows(out, row, len(rows)), receive, send, self.group)  # (M, C)
        return _add_rows(back, token, len(x))


def _add_rows(x: Tensor, index: Tensor, rows: int) -> Tensor:
    """Sums of the rows of x (M, C) that share an index, at least in float32 -> (rows, C)."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return x.new_zeros(rows, x.shape[1], dtype=wide).index_add(0, index, x.to(wide)).to(x.dtype)


class _Exchange(torch.autograd.Function):
    """All-to-all of rows with uneven splits; its gradient is the all-to-all back."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup
    ) -> Tensor:
        ctx.exchange = send, receive, group
        out = x.new_empty(sum(receive), *x.shape[1:])
        dist.all_to_all_single(out, x.contiguous(), receive, send, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor):
        send, receive, group = ctx.exchange
        return _Exchange.apply(grad, receive, send, group), None, None, None


def share_experts(model: nn.Module, *, size: int, pipeline_stages: int = 1) -> None:
    """Replaces the experts of every MoE layer of a model on the meta device by this rank's part of
    them.
    """
    private.make_expert_groups(size, pipeline_stages)
    for module in model.modules():
        if isinstance(module, MoE):
            module.experts = LocalExperts(module.experts, size)
