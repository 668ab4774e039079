"""Cross-entropy of all 1+D heads without ever holding the logits.

Shapes: M rows (tokens of any number of heads), C hidden_size, V vocab.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dsv3_mtp.ops import choice
from dsv3_mtp.ops.chunked import chunked

# logits of one chunk: 64 MiB in float32, whatever the vocabulary and the number of depths
CHUNK_ELEMENTS = 2**24
# that many at a time, of 2 bytes each: its products want more than a few hundred rows
CHUNKS_ON_GPU = 8


def chunk_rows(vocab: int, *, on_gpu: bool) -> int:
    """Rows of one chunk. On a GPU at least 4096 and whole tiles of 256: with the 1038 that 2^27
    logits of V3's vocabulary would be, a tenth of each product is lost, and the weight's gradient
    is read and written once for each chunk.
    """
    if not on_gpu:
        return max(1, CHUNK_ELEMENTS // vocab)
    return max(4096, CHUNKS_ON_GPU * CHUNK_ELEMENTS // vocab // 256 * 256)


class _LinearCrossEntropy(torch.autograd.Function):
    """Gradients are computed in forward by chunks, so that a chunk's logits live only once."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, row_weight: Tensor):
        rows = chunk_rows(weight.shape[0], on_gpu=hidden.is_cuda)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        targets, row_weight = targets.contiguous(), row_weight.to(wide).contiguous()
        cross_entropy = _cross_entropy if targets.ndim == 1 else _of_several_targets
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None  # (M, C)
        # (V, C)
        grad_weight = torch.zeros_like(weight, dtype=wide) if ctx.needs_input_grad[1] else None
        nll = torch.empty(targets.shape, dtype=wide, device=hidden.device)  # (M,) or (M, n)
        prediction = targets.new_empty(len(targets))  # (M,)
        for start in range(0, hidden.shape[0], rows):
            chunk = slice(start, start + rows)
            logits = hidden[chunk] @ weight.T  # (rows, V)
            grad_logits, nll[chunk], prediction[chunk] = cross_entropy(
                logits, targets[chunk], row_weight[chunk]
            )
            if grad_hidden is not None:
                torch.mm(grad_logits, weight, out=grad_hidden[chunk])
            if grad_weight is not None:
                if grad_weight.dtype == hidden.dtype:
                    grad_weight.addmm_(grad_logits.T, hidden[chunk])
                elif hidden.is_cuda:  # not rounded before it is added
                    grad_weight += torch.mm(grad_logits.T, hidden[chunk], out_dtype=wide)
                else:
                    grad_weight.add_(grad_logits.T @ hidden[chunk])
            del logits, grad_logits  # or two chunks are held while the next is made
        ctx.gradients = grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype)
        ctx.mark_non_differentiable(nll, prediction)
        return torch.dot(nll.flatten(), row_weight.flatten()), nll, prediction

    @staticmethod
    def backward(ctx, grad_loss: Tensor, _nll, _prediction):
        if ctx.gradients is None:
            raise RuntimeError(
                "linear_cross_entropy: its gradients were used up by the first backward"
            )
        grad_hidden, grad_weight = ctx.gradients
        ctx.gradients = None  # they are scaled in place below
        for gradient in (grad_hidden, grad_weight):
            if gradient is not None:
                gradient.mul_(grad_loss)
        return grad_hidden, grad_weight, None, None


def _cross_entropy(
    logits: Tensor, targets: Tensor, row_weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Of each row d loss / d logits = weight * (softmax - onehot) in place, nll, prediction."""
    if (kernels := choice.kernels(logits)) is not None:
        return logits, *kernels.cross_entropy_(logits, targets, row_weight)
    dtype, logits = logits.dtype, logits.to(row_weight.dtype)
    prediction = logits.argmax(-1)
    logits.sub_(logits.logsumexp(-1, keepdim=True))  # now log-probabilities
    nll = -logits.gather(1, targets[:, None]).squeeze(1)
    logits.exp_().scatter_add_(
        1, targets[:, None], logits.new_full((), -1.0).expand(logits.shape[0], 1)
    )
    logits.mul_(row_weight[:, None])
    return logits.to(dtype), nll, prediction


def _of_several_targets(
    logits: Tensor, targets: Tensor, row_weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`_cross_entropy` of rows that are scored against n targets each. targets, row_weight: (M,
    n).

    The nll of two targets of a row differ by their logits, and the gradients by the two entries of
    these targets: the first target takes the weight of all, the others are put right.
    """
    picked = logits.gather(1, targets).to(row_weight.dtype)  # (M, n)
    total = row_weight.sum(1)
    grad, first, prediction = _cross_entropy(logits, targets[:, 0].contiguous(), total)
    change = -row_weight
    change[:, 0] += total
    grad.scatter_add_(1, targets, change.to(grad.dtype))
    return grad, first[:, None] + picked[:, :1] - picked, prediction


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, row_weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax cross-entropy of `hidden @ weight.T` with one weight per row (V3 eq. 24-25: 1/n for
    the main head, lambda w_k / (D n_k) for depth k, 0 for a slot that has no valid target).

    Args:
        hidden: (M, C) normed hidden states of one or several heads, concatenated.
        weight: (V, C) output head, the same Parameter for all rows.
        targets: (M,) int64 in [0, V); or (M, n), several for each row.
        row_weight: (M,) or (M, n), any float.

    Returns:
        loss: scalar `sum(row_weight * nll)`, differentiable in `hidden` and `weight`, once.
        nll: (M,) or (M, n) float32 (float64 for float64 input), no gradient.
        prediction: (M,) int64 argmax of the logits.

    Peak extra memory is one chunk of logits plus the two gradients, independent of M and of the
    number of depths.
    """
    if not torch.is_grad_enabled():  # or forward would compute the gradients all the same
        hidden, weight = hidden.detach(), weight.detach()
    return _LinearCrossEntropy.apply(hidden, weight, targets, row_weight)


def chunked_cross_entropy(
    logits: Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor],
    inputs: Sequence[Tensor],
    weights: Sequence[Tensor],
    targets: Tensor,
    row_weight: Tensor,
    *,
    vocab_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """`linear_cross_entropy` of any `logits(inputs, weights)`: of n rows (n, V). inputs: (M, .)
    each; the other arguments and the result as there.

    Peak extra memory is a few chunks of logits and the gradients, independent of M.
    """
    wide = torch.promote_types(inputs[0].dtype, torch.float32)
    row_weight = row_weight.to(wide)

    def chunk_loss(chunk: slice, inputs: Sequence[Tensor], weights: Sequence[Tensor]):
        log_p = logits(inputs, weights).to(wide).log_softmax(-1)
        aims = targets[chunk] if targets.ndim == 2 else targets[chunk, None]
        nll = -log_p.gather(1, aims).view_as(targets[chunk])
        return (nll * row_weight[chunk]).sum(), nll, log_p.argmax(-1)

    rows = chunk_rows(vocab_size, on_gpu=inputs[0].is_cuda)
    return chunked(chunk_loss, inputs, weights, rows=rows, name="chunked_cross_entropy")
