"""Any objectives on any heads, without ever holding the logits: chunks of slots, all depths of a
slot in one chunk, the teacher's logits beside those of the heads.

Shapes: N = B*T slots of a micro-batch, d depths that have rows, n slots of a chunk, V vocab, m
objectives.
"""

from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from dsv3_mtp.model.states import HeadRows, LMHead, Output, opened
from dsv3_mtp.objectives.base import Objective, Slots, checked_loss
from dsv3_mtp.ops.chunked import chunked

# d * n * V of one chunk: 64 MiB in float32, and at most eight such tensors live at a time
CHUNK_ELEMENTS = 2**24
CHUNKS_ON_GPU = 4  # its products want more than a few hundred rows


class Teacher(NamedTuple):
    """The main head, with which the heads are compared."""

    head: LMHead
    # (B, T + A, C) without gradient: what it reads at the T slots here and at A slots after them
    states: Tensor
    ahead: tuple[int, ...]  # of depth 1..D: how many slots after its own the teacher's slot is

    def log_p(self, start: int, stop: int, depths: Sequence[int], weight: Tensor, length: int):
        """(d, n, V) float32 or wider: log-probabilities for slots start..stop-1 of N, with rows of
        `length` = T slots. Where a row has no such slot it is some other slot's.
        """
        stored, last = self.states.shape[1], len(self.states) * self.states.shape[1] - 1
        ahead = [self.ahead[depth - 1] for depth in depths]
        slots = torch.arange(start, stop, device=weight.device)
        base = slots // length * stored + slots % length  # (n,) where slot i itself is stored
        first = start // length * stored + start % length + min(ahead)
        end = (stop - 1) // length * stored + (stop - 1) % length + max(ahead)
        first, end = min(first, last), min(end, last)
        # every slot once, however many depths are compared with it
        logits = self.head.logits([self.states.flatten(0, 1)[first : end + 1]], [weight])
        log_p = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
        del logits
        return torch.stack([log_p[(base + a).clamp(max=last) - first] for a in ahead])


def objective_losses(
    objectives: Sequence[Objective],
    students: Sequence[HeadRows],
    teacher: Teacher,
    targets: Tensor,
    weight: Tensor,
) -> tuple[Tensor, Tensor]:
    """The weighted sum of all objectives over all depths and slots.

    Args:
        students: the rows of the heads, those of the main head not among them.
        targets: (D, B, T) labels.
        weight: (m, D, B, T): 0 where a slot does not count.

    Returns the loss, a scalar that is differentiable in what the students read, once; and every
    value (m, D, B, T), without a gradient, 0 for a depth that has no row.

    Peak extra memory is eight chunks and the gradients, whatever B, T and D are.
    """
    (_, count, length), vocab = targets.shape, teacher.head.out_features
    depths = sorted(depth for one in students for depth in one.depths)
    modules: list[Output] = list(
        dict.fromkeys([teacher.head, *(output for one in students for output in one.outputs)])
    )
    sizes = [len(module.weights()) for module in modules]
    # not targets[list]: on CUDA the host would wait for the indices
    aims = torch.stack([targets[depth - 1].flatten() for depth in depths])  # (d, N)
    weight = torch.stack([weight[:, depth - 1].flatten(1) for depth in depths], 1)  # (m, d, N)

    def run(inputs: Sequence[Tensor], weights: list[Tensor]) -> tuple[Tensor, Tensor]:
        main = weights[0].detach()

        def loss_of(chunk: slice, inputs: Sequence[Tensor], weights: Sequence[Tensor]):
            own = dict(zip(modules, _cut(weights, sizes), strict=True))
            stop = min(chunk.stop, count * length)
            with torch.no_grad():
                log_p = teacher.log_p(chunk.start, stop, depths, main, length)
            slots = Slots(_logits(students, inputs, own), log_p, aims[:, chunk])
            values = torch.stack([checked_loss(objective, slots) for objective in objectives])
            return (values * weight[..., chunk]).sum(), values.movedim(2, 0)

        on_device = CHUNKS_ON_GPU if main.is_cuda else 1
        rows = max(CHUNK_ELEMENTS * on_device // (len(depths) * vocab), 1)
        return chunked(loss_of, inputs, weights, rows=rows, name="objective_losses")

    inputs = [x.flatten(0, 1) for one in students for x in one.inputs]
    loss, values = opened(modules, inputs, run)  # values: (N, m, d)
    found = values.new_zeros(len(objectives), *targets.shape)
    for at, depth in enumerate(depths):
        found[:, depth - 1] = values[..., at].T.unflatten(1, (count, length))
    return loss, found


def _logits(
    students: Sequence[HeadRows], inputs: Sequence[Tensor], own: dict[Output, Sequence[Tensor]]
) -> Tensor:
    """(d, n, V), at least float32, of increasing depth. inputs: n rows of all that students read;
    own: the weights of each module.
    """
    given = _cut(inputs, [len(one.inputs) for one in students])
    found: list[Tensor] = []
    depths: list[int] = []
    for outputs, same in groupby(zip(students, given, strict=True), lambda pair: pair[0].outputs):
        group = list(same)
        rows = [torch.cat(parts) for parts in zip(*(part for _, part in group), strict=True)]
        logits = outputs[-1].logits(rows, [x for output in outputs for x in own[output]])
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        for (one, _), of_one in zip(group, logits.chunk(len(group)), strict=True):
            depths += one.depths
            found += [of_one] * len(one.depths)
        if len(group) == len(students) and depths == sorted(depths) and len(depths) == len(group):
            return logits.unflatten(0, (len(group), -1))  # no copy
    return torch.stack([found[at] for at in sorted(range(len(depths)), key=depths.__getitem__)])


def _cut(values: Sequence[Tensor], sizes: Sequence[int]) -> list[Sequence[Tensor]]:
    """`values` in parts of these sizes."""
    ends = [sum(sizes[: number + 1]) for number in range(len(sizes))]
    return [values[end - size : end] for end, size in zip(ends, sizes, strict=True)]
