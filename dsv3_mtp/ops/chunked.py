"""A loss over many rows whose intermediate tensors live for one chunk of rows only."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


class _Chunked(torch.autograd.Function):
    """Gradients are computed in forward, chunk by chunk, so that each chunk's graph lives only
    once. By torch.autograd.grad on detached copies: .backward() would run the hooks of ZeRO and of
    the bfloat16 optimizer in the middle of the forward.
    """

    @staticmethod
    def forward(ctx, loss_of: Callable, rows: int, name: str, inputs: int, *tensors: Tensor):
        ctx.name = name
        wanted = [number for number, need in enumerate(ctx.needs_input_grad[4:]) if need]
        wide = torch.promote_types(tensors[0].dtype, torch.float32)
        gradients: dict[int, Tensor] = {
            n: torch.zeros_like(tensors[n], dtype=None if n < inputs else wide) for n in wanted
        }
        loss, kept = torch.zeros((), dtype=wide, device=tensors[0].device), []
        for start in range(0, len(tensors[0]), rows):
            chunk = slice(start, start + rows)
            leaves = [x[chunk].detach() for x in tensors[:inputs]]
            leaves += [x.detach() for x in tensors[inputs:]]
            for n in wanted:
                leaves[n].requires_grad_()
            with torch.enable_grad():
                part, *rest = loss_of(chunk, leaves[:inputs], leaves[inputs:])
            # A weight may be unused: a head does not have to read all that stands in its module.
            found = torch.autograd.grad(part, [leaves[n] for n in wanted], allow_unused=True)
            for n, gradient in zip(wanted, found, strict=True):
                if gradient is None:
                    continue
                if n < inputs:
                    gradients[n][chunk] = gradient
                else:
                    gradients[n] += gradient
            loss += part.detach()
            kept.append([x.detach() for x in rest])
            del part, rest, found  # or two chunks are held while the next is made
        ctx.gradients = [
            gradients[n].to(x.dtype) if n in gradients else None for n, x in enumerate(tensors)
        ]
        results = [torch.cat(same) for same in zip(*kept, strict=True)]
        ctx.mark_non_differentiable(*results)
        return loss, *results

    @staticmethod
    def backward(ctx, grad_loss: Tensor, *_rest):
        if ctx.gradients is None:
            raise RuntimeError(f"{ctx.name}: its gradients were used up by the first backward")
        found, ctx.gradients = ctx.gradients, None  # they are scaled in place
        return None, None, None, None, *(None if x is None else x.mul_(grad_loss) for x in found)


def chunked(
    loss_of: Callable[[slice, Sequence[Tensor], Sequence[Tensor]], Sequence[Tensor]],
    inputs: Sequence[Tensor],
    weights: Sequence[Tensor],
    *,
    rows: int,
    name: str,
) -> Any:
    """The sum of `loss_of` over chunks of `rows` rows, differentiable in inputs and weights, once.

    Args:
        loss_of: (slice of a chunk, its rows of the inputs, weights) -> the loss of the chunk, a
            scalar, and any tensors with a row for each of its rows.
        inputs: (M, .) each.
        weights: any shapes.
        name: of the caller, for the error of a second backward.

    Returns the loss, and the tensors of all chunks behind each other, without a gradient.

    Beside the gradients and the returned tensors, memory is what one call of `loss_of` and its
    backward need, whatever M is.
    """
    tensors = [*inputs, *weights]
    # or forward would compute the gradients all the same
    if not torch.is_grad_enabled() or not any(x.requires_grad for x in tensors):
        with torch.no_grad():
            parts = [
                loss_of(slice(at, at + rows), [x[at : at + rows] for x in inputs], weights)
                for at in range(0, len(inputs[0]), rows)
            ]
            loss, *kept = zip(*parts, strict=True)
            return torch.stack(loss).sum(), *(torch.cat(same) for same in kept)
    return _Chunked.apply(loss_of, rows, name, len(inputs), *tensors)
