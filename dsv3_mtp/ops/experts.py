"""The routed experts of one layer: sort by expert, products of each expert, weigh, and back to the
tokens.

One autograd function with its own backward, so that no step of it keeps more than it needs or
scatters gradients. The gates weigh the hidden layer, F numbers per row, which is the same as
weighing the output, C numbers. For FP8 products, which have a backward of their own, the other
steps are there one by one too. Shapes: rows = N*K token-expert pairs, sorted by expert (plus
padding, see `Permutation`).
"""

from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv3_mtp.ops import choice, swiglu

# rows of an expert under oneDNN, which compiles a kernel per shape: 0.5 ms for each count not seen
# yet
MULTIPLE = 64


class Stack(Protocol):
    """Weights of experts (E, out, in) that are made when they are asked for, and do not learn."""

    @property
    def shape(self) -> torch.Size: ...

    def __getitem__(self, expert: int) -> Tensor:
        """(out, in)"""
        ...

    def whole(self) -> Tensor:
        """(E, out, in)"""
        ...

    def blocks(self) -> tuple[Tensor, Tensor] | None:
        """FP8 codes (E, out, in) and the scales of their 128 x 128 blocks, where there are any and
        no block would be in two matrices.
        """
        ...


class Permutation(NamedTuple):
    """Where each token-expert pair sits among the sorted rows."""

    source: Tensor  # (rows,) int64: the token of each row; 0 for padding
    slots: Tensor  # (N, K) int64: the row of each pair
    # (rows,): the gate of each row; 0 for padding, which therefore neither adds nor learns
    gates: Tensor
    counts: Tensor  # (E,) int64: rows of each expert


def padding(x: Tensor) -> int:
    """What each expert's rows are padded to a multiple of."""
    by_onednn = x.dtype == torch.bfloat16 or torch.get_float32_matmul_precision() != "highest"
    return MULTIPLE if x.device.type == "cpu" and by_onednn else 1


def sort_by_expert(
    chosen: Tensor, gates: Tensor, counts: Tensor, multiple: int, padded_rows: int | None = None
) -> Permutation:
    """chosen, gates: (N, K), counts: (E,). padded_rows: of all experts together. A caller on a GPU
    that knows this number gives it, so that the host need not wait for `counts`.
    """
    order = chosen.flatten().argsort(stable=True)  # (N*K,) pairs grouped by expert
    place, rows = torch.arange(order.numel(), device=order.device), order.numel()
    if multiple > 1:
        padded = (counts + multiple - 1) // multiple * multiple
        shift = (padded.cumsum(0) - padded) - (counts.cumsum(0) - counts)  # (E,)
        place = place + shift[chosen.flatten()[order]]
        counts, rows = padded, int(padded.sum()) if padded_rows is None else padded_rows
    source = order.new_zeros(rows).index_copy_(0, place, order // chosen.shape[1])
    row_gates = gates.new_zeros(rows).index_copy_(0, place, gates.flatten()[order])
    return Permutation(
        source,
        torch.empty_like(order).index_copy_(0, order, place).view_as(chosen),
        row_gates,
        counts,
    )


def _products(
    x: Tensor,
    gates: Tensor,
    gate_up: Tensor | Stack,
    down: Tensor | Stack,
    chosen: Tensor,
    counts: Tensor,
) -> tuple[Tensor, Tensor, Permutation, list[int] | Tensor]:
    """`routed`, and what its backward needs: gate and up (rows, 2F), the order of the rows, and
    the rows of each expert.
    """
    wide = gates.to(torch.promote_types(gates.dtype, torch.float32))
    layout = sort_by_expert(chosen, wide, counts, padding(x))
    rows = layout.counts if grouped_kernel(x, gate_up, down) else layout.counts.tolist()
    inner = grouped(x.index_select(0, layout.source), gate_up, rows)  # (rows, 2F)
    gate, up = inner.chunk(2, dim=1)
    hidden = swiglu.forward(choice.kernels(x), gate, up, layout.gates)
    out = grouped(hidden, down, rows)  # (rows, C)
    return combine(out, layout.slots), inner, layout, rows


class _Routed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x: Tensor, gates: Tensor, gate_up: Tensor, down: Tensor, chosen: Tensor, counts: Tensor
    ):
        ctx.kernels, ctx.gates_dtype = choice.kernels(x), gates.dtype
        y, inner, layout, ctx.rows = _products(x, gates, gate_up, down, chosen, counts)
        ctx.save_for_backward(x, gate_up, down, inner, layout.source, layout.slots, layout.gates)
        return y

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, gate_up, down, inner, source, slots, row_gates = ctx.saved_tensors
        grad_out = grad.index_select(0, source)  # (rows, C), as if no gate came after it
        grad_hidden = grouped_input_grad(grad_out, down, ctx.rows)
        gate, up = inner.chunk(2, dim=1)
        grad_inner, grad_gates, hidden = swiglu.backward(
            ctx.kernels, grad_hidden, gate, up, row_gates
        )
        assert grad_gates is not None and hidden is not None  # there are gates
        del grad_hidden  # each is as large as all that the layer keeps
        grad_down = (
            grouped_weight_grad(grad_out, hidden, ctx.rows) if ctx.needs_input_grad[3] else None
        )
        del hidden
        rows = torch.index_select(x, 0, source, out=grad_out)  # gathered again rather than kept
        grad_gate_up = (
            grouped_weight_grad(grad_inner, rows, ctx.rows) if ctx.needs_input_grad[2] else None
        )
        grad_x = combine(grouped_input_grad(grad_inner, gate_up, ctx.rows), slots)
        return grad_x, grad_gates[slots].to(ctx.gates_dtype), grad_gate_up, grad_down, None, None


def routed(
    x: Tensor,
    gates: Tensor,
    gate_up: Tensor | Stack,
    down: Tensor | Stack,
    chosen: Tensor,
    counts: Tensor,
) -> Tensor:
    """Sum over the K chosen experts of gate * down(silu(gate_proj(x)) * up_proj(x)).

    Args:
        x: (N, C); chosen, gates: (N, K); counts: (E,) int64, how many pairs chose each expert.
        gate_up: (E, 2F, C), gate rows first; down: (E, C, F). Both tensors, or both stacks; with
            stacks there is no backward.
    Returns:
        (N, C)
    """
    if isinstance(gate_up, Tensor):
        return _Routed.apply(x.contiguous(), gates, gate_up, down, chosen, counts)
    assert not (torch.is_grad_enabled() and x.requires_grad), "stacks have no backward"
    return _products(x.contiguous(), gates, gate_up, down, chosen, counts)[0]


# --- the products ---------------------------------------------------------------------------------
# `rows`: rows of each expert, an int64 tensor (E,) where one kernel does all experts, else a list
# of E numbers.


def grouped_kernel(x: Tensor, *weights: Tensor | Stack) -> bool:
    """Whether F.grouped_mm does it, for which the host never waits: bfloat16 on a GPU, rows of
    whole 16 bytes.

    And matrices that begin at such: under ZeRO all lie in one buffer, where one of odd sides shifts
        the next.
    """
    numbers: list[int | torch.SymInt] = [n for weight in weights for n in weight.shape[1:]]
    numbers += [weight.storage_offset() for weight in weights if isinstance(weight, Tensor)]
    return (
        x.device.type == "cuda"
        and x.dtype == torch.bfloat16
        and all(number % 8 == 0 for number in numbers)
    )


def grouped(x: Tensor, weight: Tensor | Stack, rows: list[int] | Tensor) -> Tensor:
    """Rows of expert e times weight[e].T. x: (rows, in), weight: (E, out, in) -> (rows, out). Of a
    stack only the experts with rows are made, unless one kernel does all.
    """
    if isinstance(rows, Tensor):
        weight = whole(weight)
        return F.grouped_mm(x, weight.transpose(1, 2), offs=rows.cumsum(0, dtype=torch.int32))
    out = x.new_empty(x.shape[0], weight.shape[1])
    for number, (part, target) in enumerate(zip(x.split(rows), out.split(rows), strict=True)):
        if len(part):
            torch.mm(part, weight[number].T, out=target)
    return out


def whole(weight: Tensor | Stack) -> Tensor:
    """(E, out, in)"""
    return weight if isinstance(weight, Tensor) else weight.whole()


def grouped_input_grad(grad: Tensor, weight: Tensor, rows: list[int] | Tensor) -> Tensor:
    """Rows of expert e times weight[e]. grad: (rows, out), weight: (E, out, in) -> (rows, in)."""
    return grouped(grad, weight.transpose(1, 2), rows)


def grouped_weight_grad(grad: Tensor, x: Tensor, rows: list[int] | Tensor) -> Tensor:
    """Of each expert grad.T @ x: (rows, out), (rows, in) -> (E, out, in); zero without rows."""
    if isinstance(rows, Tensor):
        out = F.grouped_mm(grad.T, x, offs=rows.cumsum(0, dtype=torch.int32))
        if leaves_empty_groups(x.device):
            out.masked_fill_((rows == 0)[:, None, None], 0)
        return out
    out = x.new_empty(len(rows), grad.shape[1], x.shape[1])
    for left, right, target in zip(grad.split(rows), x.split(rows), out, strict=True):
        torch.mm(left.T, right, out=target)
    return out


def leaves_empty_groups(device: torch.device) -> bool:
    """Whether F.grouped_mm leaves what was in memory in the products of empty groups: on Blackwell
    (pytorch#172439, open in November 2026), and not on Hopper.
    """
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 10


def combine(rows: Tensor, slots: Tensor) -> Tensor:
    """Sum of the K rows of each token; a slot of -1 names none. rows: (rows, C), slots: (N, K) ->
    (N, C). In one order, without atomic additions: the same bits every time.
    """
    if (kernels := choice.kernels(rows)) is not None:
        return kernels.sum_rows(rows, slots)
    if not len(rows):
        return rows.new_zeros(len(slots), rows.shape[1])
    there = (slots >= 0).to(rows.dtype)
    return F.embedding_bag(slots.clamp(min=0), rows, mode="sum", per_sample_weights=there)


def spread(x: Tensor, source: Tensor, slots: Tensor) -> Tensor:
    """x[source], whose gradient is summed by `combine`. x: (N, C); source: (rows,) -> (rows, C);
    slots: (N, K), where in `source` each row of x is, filled up with -1.
    """
    return _Spread.apply(x, source, slots)


def gather_sum(rows: Tensor, source: Tensor, slots: Tensor) -> Tensor:
    """`combine` with a gradient: the counterpart of `spread`. (rows, C) -> (N, C)."""
    return _GatherSum.apply(rows, source, slots)


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, source: Tensor, slots: Tensor):
        ctx.save_for_backward(slots)
        return x.index_select(0, source)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return combine(grad.contiguous(), *ctx.saved_tensors), None, None


class _GatherSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor, source: Tensor, slots: Tensor):
        ctx.save_for_backward(source)
        return combine(rows, slots)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad.index_select(0, *ctx.saved_tensors), None, None


# --- the other steps one by one -------------------------------------------------------------------


def to_experts(x: Tensor, layout: Permutation) -> Tensor:
    """(N, C) -> (rows, C), the experts' rows. Padding is zeros: FP8's tiles see it."""
    return _ToExperts.apply(x, layout.source, layout.slots)


def from_experts(rows: Tensor, layout: Permutation) -> Tensor:
    """The sum of each token's rows, (rows, C) -> (N, C)."""
    return _FromExperts.apply(rows, layout.source, layout.slots)


class _ToExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, source: Tensor, slots: Tensor):
        ctx.save_for_backward(slots)
        return scatter(x, source, slots)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return combine(grad.contiguous(), *ctx.saved_tensors), None, None


class _FromExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor, source: Tensor, slots: Tensor):
        ctx.save_for_backward(source, slots)
        return combine(rows, slots)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return scatter(grad, *ctx.saved_tensors), None, None


def scatter(x: Tensor, source: Tensor, slots: Tensor) -> Tensor:
    """x (N, C), source (rows,), slots (N, K) -> (rows, C): what `combine` sums, else zeros."""
    if source.numel() == slots.numel():
        return x.index_select(0, source)
    real = torch.zeros_like(source, dtype=torch.bool).index_fill_(0, slots.flatten(), True)
    return torch.where(real.unsqueeze(1), x[source], 0)
