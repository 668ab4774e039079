"""Expert parallelism: the experts of a layer divided over a group of ranks, each token sent to where its experts are.

DeepSpeed's groups (deepspeed.utils.groups): with R ranks and parallel.expert_parallel_size = P, ranks [0..P) hold one
copy of all experts, [P..2P) the next; rank r holds experts [r % P * E/P ...) and shares them with the R/P ranks of the
same r % P. Experts are in the order of their groups, and ranks in the order of their nodes: V3's groups are nodes.
"""

from typing import Any

import deepspeed.moe.layer
import torch
import torch.distributed as dist
from deepspeed.utils import groups
from torch import Tensor, nn

from dsv3_mtp.model.moe import Experts, MoE


class LocalExperts(Experts, deepspeed.moe.layer.MoE):
    """This rank's experts of a layer, with the interface of all of them.

    Dropless: every row travels to its expert's rank and back, however uneven the load. A rank that gets no row takes
    part all the same, and its experts get zero gradients.

    Being one of DeepSpeed's MoE layers is what makes DeepSpeed reduce the gradients of parameters with allreduce=False
    over the ranks that hold copies of them, divide by all ranks, and count every expert once in the gradient norm.
    """

    def __init__(self, whole: Experts, size: int):
        nn.Module.__init__(self)  # not DeepSpeed's, which would build a router and experts of its own
        self.group_name = f"ep_size_{size}"
        self.group = groups._get_expert_parallel_group(self.group_name)
        self.num_experts = len(whole.down_proj)
        count = self.num_experts // size
        self.first = groups._get_expert_parallel_rank(self.group_name) * count
        for name, parameter in whole.named_parameters():
            self.register_parameter(name, nn.Parameter(parameter.new_empty(count, *parameter.shape[1:])))

    def mark(self) -> None:
        """To be called once the parameters have storage: materialising makes new ones without attributes."""
        for parameter in self.parameters():
            parameter.allreduce, parameter.group_name = False, self.group_name  # type: ignore[attr-defined]

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        """DeepSpeed asks for the groups, which are there already."""

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        """x: (rows, C) of this rank's tokens, sorted by expert; counts: (E,) int64 rows of each expert -> (rows, C)."""
        arriving = torch.empty_like(counts)
        dist.all_to_all_single(arriving, counts.contiguous(), group=self.group)
        ranks = self.num_experts // len(self.down_proj)
        leaving, arriving = counts.view(ranks, -1), arriving.view(ranks, -1)  # (ranks, local experts)
        send, receive = torch.stack([leaving.sum(1), arriving.sum(1)]).tolist()
        rows = _Exchange.apply(x, send, receive, self.group)  # by rank of origin, then by expert
        expert = torch.arange(arriving.shape[1], device=x.device).repeat(ranks).repeat_interleave(arriving.flatten())
        order = expert.argsort(stable=True)
        back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=x.device))
        out = super().forward(rows[order], arriving.sum(0))
        return _Exchange.apply(out[back], receive, send, self.group)


class _Exchange(torch.autograd.Function):
    """All-to-all of rows with uneven splits; its gradient is the all-to-all back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.exchange = send, receive, group
        out = x.new_empty(sum(receive), *x.shape[1:])
        dist.all_to_all_single(out, x.contiguous(), receive, send, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor):
        send, receive, group = ctx.exchange
        return _Exchange.apply(grad, receive, send, group), None, None, None


def share_experts(model: nn.Module, *, size: int, pipeline_stages: int = 1) -> None:
    """Replaces the experts of every MoE layer of a model on the meta device by this rank's part of them."""
    if f"ep_size_{size}" not in groups._get_expert_parallel_group_dict():
        groups._create_expert_and_data_parallel(size, pp_size=pipeline_stages)
    for module in model.modules():
        if isinstance(module, MoE):
            module.experts = LocalExperts(module.experts, size)
