"""Overlap: how much of the main model's distribution the drafts have, along real text
and without a draw.

Depth k at slot i and the main head at slot i+k both predict t_{i+k+1}: q_k and its teacher p. A
draft from q_k is accepted with probability sum_v min(p(v), q_k(v)) by the rejection rule (arXiv
2211.17192), given that the tokens before it are the real text. Everything here works on hidden
states and on one function

    head_logits(depth, hidden (B, n, C)) -> (B, n, V)        depth 0: the main head

chunk by chunk: the logits of all slots are never held. Shapes: B rows, T slots, C hidden_size, V
vocab, D depths.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv3_mtp.model.states import HeadRows
from dsv3_mtp.model.targets import teacher_slots
from dsv3_mtp.ops.compute import Shard

HeadLogits = Callable[[int, Any], Tensor]
States = Tensor | HeadRows | None
CHUNK_ELEMENTS = 2**22  # log-probabilities of a chunk: 16 MiB in float32, and some copies


@dataclass(frozen=True)
class Pair:
    """The drafts of a depth beside their teachers: log-probabilities, at least float32."""

    depth: int
    slots: slice  # of the drafts, i
    teacher: Tensor  # (B, n, V) log p at slots i + depth
    draft: Tensor  # (B, n, V) log q at slots i

    @property
    def overlap(self) -> Tensor:
        """(B, n) sum_v min(p, q), in log space: what float32 cannot hold counts too."""
        return torch.minimum(self.teacher, self.draft).logsumexp(-1).exp()


def pairs(
    head_logits: HeadLogits,
    hiddens: Sequence[States],
    following: Tensor,
    vocab_size: int,
    offsets: Sequence[int],
    *,
    temperature: float = 1.0,
    outside: Tensor | None = None,
) -> Iterator[Pair]:
    """Every slot of every depth beside its teacher, one chunk after another.

    Args:
        hiddens: of depth 0..D as `head_logits` reads them: of depth 0 (B, T, C), of others that or
            the rows of a head; None: the depth has none.
        offsets: of depth 0..D; the largest is 1 + A.
        following: (B, A, C) of the main head: the slots behind these T, where the row goes on in
            another process, or anything: `teachers` says which of them exist. Every process makes
            the same calls, because ZeRO-3 gathers weights in them.
        temperature: > 0, of both distributions.
        outside: (V,) bool, the tokens that no draft is: q is renormalised over the others.
    """
    own = hiddens[0]
    assert isinstance(own, Tensor)
    length, main = own.shape[1], torch.cat([own, following], dim=1)  # (B, T+A, C)
    for start, stop in chunks(1, main.shape[1], len(main), vocab_size):
        teacher = log_probabilities(head_logits(0, main[:, start:stop]), temperature)
        for depth, states in enumerate(hiddens[1:], start=1):
            ahead = offsets[depth] - 1
            first, end = max(start - ahead, 0), min(stop - ahead, length)
            if first < end and states is not None:
                part = (
                    states[:, first:end] if isinstance(states, Tensor) else states.cut(first, end)
                )
                logits = head_logits(depth, part)
                if outside is not None:
                    logits = logits.masked_fill(outside, float("-inf"))
                draft = log_probabilities(logits, temperature)
                beside = teacher[:, first + ahead - start : end + ahead - start]
                yield Pair(depth, slice(first, end), beside, draft)


def chunks(first: int, last: int, rows: int, vocab_size: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of the slots [first, last) of `rows` rows whose logits are made together."""
    slots = max(1, CHUNK_ELEMENTS // (vocab_size * rows))
    return ((start, min(start + slots, last)) for start in range(first, last, slots))


def log_probabilities(logits: Tensor, temperature: float) -> Tensor:
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return (wide / temperature).log_softmax(-1)


@torch.no_grad()
def row_overlap(
    head_logits: HeadLogits,
    hiddens: Sequence[States],
    valid: Tensor,
    shard: Shard,
    vocab_size: int,
    offsets: Sequence[int],
) -> Tensor:
    """`overlap_sums` of this process's slots of rows of text.

    valid: (1+D, B, T) of `valid_targets`. The teachers of the last D slots may lie in the next
    slice of the rows (sequence parallelism): the first D states of every slice are exchanged.
    """
    ahead, length = max(offsets) - 1, valid.shape[2]
    if len(offsets) == 1:
        return valid.new_zeros((4, 0), dtype=torch.float64)
    assert isinstance(hiddens[0], Tensor)
    first = min(ahead, length)  # or all of a short slice, and then they follow on each other
    states = shard.gather(hiddens[0][:, :first])  # (B, slices * first, C)
    following = states[:, (shard.number + 1) * first :][:, :ahead]
    taught = teacher_slots(valid, offsets, following.shape[1])
    following = F.pad(following, (0, 0, 0, ahead - following.shape[1]))
    return overlap_sums(head_logits, hiddens, following, taught, vocab_size, offsets)


@torch.no_grad()
def overlap_sums(
    head_logits: HeadLogits,
    hiddens: Sequence[States],
    following: Tensor,
    taught: Tensor,
    vocab_size: int,
    offsets: Sequence[int],
) -> Tensor:
    """(4, D) float64, adds up over micro-batches and ranks: see `overlap_means`.

    taught: (D, B, T) from `teachers`. hiddens, following: see `pairs`.
    """
    overlap = slot_overlaps(head_logits, hiddens, following, taught, vocab_size, offsets)
    return sums_of_slots(overlap, taught)


@torch.no_grad()
def slot_overlaps(
    head_logits: HeadLogits,
    hiddens: Sequence[States],
    following: Tensor,
    taught: Tensor,
    vocab_size: int,
    offsets: Sequence[int],
) -> Tensor:
    """(D, B, T) float64: the overlap of every slot, anything where it has no teacher."""
    overlap = taught.new_zeros(taught.shape, dtype=torch.float64)
    for pair in pairs(head_logits, hiddens, following, vocab_size, offsets):
        overlap[pair.depth - 1][:, pair.slots] = pair.overlap.double()
    return overlap


def sums_of_slots(overlap: Tensor, taught: Tensor) -> Tensor:
    """`overlap_sums` of `slot_overlaps`."""
    counted = overlap.where(taught, 0.0)
    joint = taught.cumprod(0)
    sums = [counted, taught, counted.cumprod(0), joint]
    return torch.stack([part.double().sum((1, 2)) for part in sums])


def overlap_means(sums: Sequence[Sequence[float]]) -> dict[str, float]:
    """`overlap/k`, and `overlap/tokens_per_step` = 1 + sum_k mean of the product of depths 1..k, an
    estimate along real text: accepted drafts follow min(p, q), not the text. A depth without a
    teacher has no entry, nor then the sum.

    sums: (4, D) sum of overlaps, slots that have a teacher, sum of products, slots where depths
    1..k all have one.
    """
    metrics = {
        f"overlap/{k}": o / n for k, (o, n) in enumerate(zip(*sums[:2], strict=True), start=1) if n
    }
    if sums[3] and all(sums[3]):
        products = zip(*sums[2:], strict=True)
        metrics["overlap/tokens_per_step"] = 1 + sum(product / n for product, n in products)
    return metrics
