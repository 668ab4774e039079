"""Expert parallelism: the experts of a layer divided over a group of ranks, each token sent to
where its experts are.

DeepSpeed's groups (deepspeed.utils.groups): with R ranks and parallel.expert_parallel_size = P,
ranks [0..P) hold one copy of all experts, [P..2P) the next; rank r holds experts [r % P * E/P ...)
and shares them with the R/P ranks of the same r % P. Experts are in the order of their groups, and
ranks in the order of their nodes: V3's groups are nodes.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import deepspeed.moe.layer
import torch
import torch.distributed as dist
from torch import Tensor

from dsv3_mtp.config import ModelConfig
from dsv3_mtp.model.moe import Beside, Experts, count
from dsv3_mtp.ops.experts import gather_sum, spread
from dsv3_mtp.ops.ranges import named
from dsv3_mtp.parallel import private


class LocalExperts(Experts, deepspeed.moe.layer.MoE):
    """This rank's experts of a layer, with the interface of all of them.

    Dropless: every token reaches its experts, however uneven the load. A rank that gets no row
    takes part all the same, and its experts get zero gradients.

    Being one of DeepSpeed's MoE layers is what makes DeepSpeed reduce the gradients of parameters
    with allreduce=False over the ranks that hold copies of them, divide by all ranks, and count
    every expert once in the gradient norm.
    """

    def __init__(self, config: ModelConfig, *, size: int):
        # not DeepSpeed's, which would build a router and experts of its own
        Experts.__init__(self, config, count=config.n_routed_experts // size)
        self.group_name = f"ep_size_{size}"
        self.group, place = private.expert_group(self.group_name)
        self.num_experts = config.n_routed_experts  # of the whole layer
        self.first = place * len(self.down_proj)

    def mark(self) -> None:
        """To be called once the tensors have storage: materialised ones have no attributes."""
        for tensor in (*self.parameters(), *self.buffers()):
            tensor.allreduce, tensor.group_name = False, self.group_name  # type: ignore[attr-defined]

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        """DeepSpeed asks for the groups, which are there already."""

    def forward(
        self, x: Tensor, chosen: Tensor, gates: Tensor, counts: Tensor, beside: Beside | None = None
    ) -> Tensor:
        """`Experts.forward` for this rank's tokens, with the experts of all ranks of the group.

        A token travels once to each rank that has experts of it (dispatch), and the sum of their
        outputs once back (combine). `beside` is computed while the tokens travel. The host waits
        once, for the sizes. x: (N, C); chosen, gates: (N, K); counts: (E,) -> (N, C).
        """
        local = len(self.down_proj)
        ranks = len(counts) // local
        home = chosen // local  # (N, K) rank of each choice
        wanted = chosen.new_zeros(len(x), ranks).scatter_(1, home, 1)  # (N, ranks)
        choices = count(home, ranks)  # of this rank's tokens, per rank of the group
        leaving = torch.stack([wanted.sum(0), choices], dim=1)  # (ranks, 2): rows and choices
        arriving = torch.empty_like(leaving)
        dist.all_to_all_single(arriving, leaving, group=self.group)
        sizes = torch.stack([leaving, arriving]).tolist()
        send, receive = ([rows for rows, _ in part] for part in sizes)
        pairs = sum(number for _, number in sizes[1])

        token, slots = _rows_of(wanted, sum(send))  # (M,), (N, ranks): sorted by rank
        rank = torch.arange(ranks, device=x.device).repeat_interleave(
            leaving[:, 0], output_size=sum(send)
        )
        there = home.index_select(0, token) == rank.unsqueeze(1)
        # (M, K) which of its choices a row is sent for
        numbers = torch.where(there, chosen.index_select(0, token) % local, -1)

        # (rows, K) of this rank's experts
        numbers = _exchange(numbers, send, receive, self.group)
        weights = _exchange(spread(gates, token, slots), send, receive, self.group)
        travel = _Travel(send, receive, self.group)
        rows = _Depart.apply(spread(x, token, slots), travel)  # (rows, C)
        other = None if beside is None else beside(x)
        out = self._of_rows(_Arrive.apply(rows, travel), weights, numbers, pairs)
        y = gather_sum(_exchange(out, receive, send, self.group), token, slots)  # of (M, C)
        return y if other is None else y + other

    def _of_rows(self, rows: Tensor, weights: Tensor, numbers: Tensor, pairs: int) -> Tensor:
        """rows: (R, C) that have arrived; weights, numbers: (R, K) gates and experts, -1 where the
        expert is another rank's; pairs: how many are not -1. -> (R, C) sums over these.
        """
        local, flat = len(self.down_proj), numbers.flatten()
        order = torch.where(flat < 0, local, flat).argsort(stable=True)[:pairs]  # by expert
        row, expert = order // numbers.shape[1], flat.index_select(0, order)
        slots = torch.full_like(flat, -1).index_copy_(
            0, order, torch.arange(pairs, device=order.device)
        )
        slots = slots.view_as(numbers)
        out = super().forward(
            spread(rows, row, slots),
            expert.unsqueeze(1),
            weights.flatten().index_select(0, order).unsqueeze(1),
            count(expert, local),
        )
        return gather_sum(out, row, slots)


def _rows_of(wanted: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """wanted: (N, ranks) of 0 and 1, `rows` of them 1 -> the token of each row, sorted by rank and
    token, and in (N, ranks) the row of each pair, -1 where there is none. Without waiting.
    """
    flat = wanted.T.flatten()
    place = torch.where(flat > 0, flat.cumsum(0) - 1, -1)
    token = torch.arange(len(wanted), device=flat.device).repeat(wanted.shape[1])
    # what is not wanted goes to a last place that is cut off
    tokens = token.new_zeros(rows + 1).index_copy_(0, torch.where(flat > 0, place, rows), token)
    return tokens[:rows], place.view(wanted.shape[1], -1).T.contiguous()


class _Travel:
    """One all-to-all of rows with uneven splits, under way between `_Depart` and `_Arrive`."""

    def __init__(self, send: list[int], receive: list[int], group: dist.ProcessGroup):
        self.send, self.receive, self.group = send, receive, group
        self.under_way: tuple[dist.Work, Tensor, Tensor] | None = None

    def start(self, x: Tensor, *, back: bool = False) -> Tensor:
        """What will have arrived after `wait`; `back`: from the receivers to the senders."""
        send, receive = (self.receive, self.send) if back else (self.send, self.receive)
        x, out = x.contiguous(), x.new_empty(sum(receive), *x.shape[1:])
        self.under_way = _all_to_all(out, x, receive, send, self.group), x, out
        return out

    def wait(self) -> Tensor:
        assert self.under_way is not None
        (work, _, out), self.under_way = self.under_way, None
        work.wait()
        return out


class _Depart(torch.autograd.Function):
    """Starts an all-to-all. Its backward waits for the one back, which `_Arrive`'s has started.

    What was computed between the two runs between their backwards as well: autograd takes the
    latest node first.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, travel: _Travel) -> Tensor:
        ctx.travel = travel
        return travel.start(x)

    @staticmethod
    def backward(ctx: Any, _grad: Tensor):  # that of rows which are still under way
        return ctx.travel.wait(), None


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, travel: _Travel) -> Tensor:
        ctx.travel = travel
        travel.wait()
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor):
        ctx.travel.start(grad, back=True)
        return grad, None


def _exchange(x: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup) -> Tensor:
    travel = _Travel(send, receive, group)
    return _Arrive.apply(_Depart.apply(x, travel), travel)


@named("all-to-all")
def _all_to_all(
    out: Tensor, x: Tensor, receive: list[int], send: list[int], group: dist.ProcessGroup
) -> dist.Work:
    return dist.all_to_all_single(out, x, receive, send, group=group, async_op=True)


def local_experts(size: int, *, pipeline_stages: int = 1) -> Callable[[ModelConfig], LocalExperts]:
    """What makes this rank's part of a layer's experts (`Compute.experts`). All ranks call it
    together: it makes their groups.
    """
    private.make_expert_groups(size, pipeline_stages)
    return partial(LocalExperts, size=size)
