"""Which token each head is to predict at each slot, which slots count, and where heads agree.

Slot i of depth k (0: the main head) predicts t_{i+offset(k)}. `offsets` are those of depths 0..D,
(1, 2, .., 1+D) for most heads; a sample has T + A + 1 tokens, of which 1 + A = max(offsets) follow
the inputs.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def target_tokens(tokens: Tensor, offsets: Sequence[int]) -> Tensor:
    """(1+D, B, T): what each depth is to predict, cut out of tokens (B, T+1+A)."""
    length = tokens.shape[1] - max(offsets)
    return torch.stack([tokens[:, offset : offset + length] for offset in offsets])


def valid_targets(
    tokens: Tensor, documents: Tensor | None, offsets: Sequence[int], scored: Tensor | None = None
) -> Tensor:
    """(1+D, B, T) bool: the target of slot i at depth k is scored and in slot i's own document
    (without them: always).

    What decides is the target, not the slot: deep heads are trained on an answer from slots of its
        prompt as well.
    """
    length = tokens.shape[1] - max(offsets)
    ahead = [slice(offset, offset + length) for offset in offsets]
    valid = torch.ones(len(ahead), tokens.shape[0], length, dtype=torch.bool, device=tokens.device)
    if documents is not None:
        valid &= torch.stack([documents[:, span] == documents[:, :length] for span in ahead])
    if scored is not None:
        valid &= torch.stack([scored[:, span] for span in ahead])
    return valid


def count_targets(
    tokens: Tensor, documents: Tensor | None, offsets: Sequence[int], scored: Tensor | None = None
) -> Tensor:
    """(2+D,) float64: valid targets of depth 0..D, number of sequences; adds up over ranks."""
    targets = valid_targets(tokens, documents, offsets, scored).sum((1, 2))
    return torch.cat([targets, targets.new_full((1,), tokens.shape[0])]).double()


def teacher_slots(valid: Tensor, offsets: Sequence[int], beyond: int = 0) -> Tensor:
    """(D, B, T) bool: the heads' valid targets that the main head predicts as well, at slot
    i+offset-1 of the same row.

    valid: (1+D, B, T) of these T slots; beyond: slots of the row that follow them elsewhere
        (sequence parallelism), without which the last offset-1 slots have no teacher.
    """
    there = valid[1:].clone()
    for depth, offset in enumerate(offsets[1:]):
        there[depth, :, max(valid.shape[2] + beyond - (offset - 1), 0) :] = False
    return there


def document_starts(documents: Tensor) -> Tensor:
    """(B, T) document numbers, each in one unbroken stretch -> (B, T) int64: the slot where
    the document of each slot begins, which is the first slot that it attends to.
    """
    slots = torch.arange(documents.shape[1], device=documents.device)
    begins = torch.ones_like(documents, dtype=torch.bool)
    begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return torch.where(begins, slots, 0).cummax(1).values


def agreement(
    prediction: Tensor, valid: Tensor, main: Tensor, offsets: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Joint agreement with the main model's own next-token argmax along real text (teacher-forced).

    Depth k at slot i and the main head at slot i+offset-1 both predict t_{i+offset}. prediction,
    valid: (1+D, B, T); main: the main head's predictions from slot 0 on, (B, T), or more where the
    row goes on in another process. Returns agreed, compared: (D,) counts; a slot is compared at
    depth k if depths 1..k have targets there, and agrees if all of them do.
    """
    depths, length = prediction.shape[0] - 1, prediction.shape[2]
    agreed = prediction.new_zeros(depths)
    compared = prediction.new_zeros(depths)
    joint = comparable = torch.ones_like(valid[0])
    for depth in range(1, 1 + depths):
        ahead = offsets[depth] - 1
        slots = min(joint.shape[1], length, max(main.shape[1] - ahead, 0))
        same = prediction[depth, :, :slots] == main[:, ahead : ahead + slots]
        comparable = comparable[:, :slots] & valid[depth, :, :slots]
        joint = joint[:, :slots] & same & comparable
        agreed[depth - 1], compared[depth - 1] = joint.sum(), comparable.sum()
    return agreed, compared
