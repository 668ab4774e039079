"""What an objective is: a function of the logits of a head, those of its teacher, and the label.

`mtp.objective` maps names to weights, and depth k is trained on

    L_k = sum over objectives of weight * sum over its slots of `loss` / number of its slots

which stands for L_k in V3 eq. 25. An objective is a subclass of `Objective` in one file of this
folder, with a name under which it registers itself; one in a file of your own is used as
`mtp.objective: {package.module:Class: 1.0}`. Nothing else compares names. docs/extend.md shows one
in full.

The teacher of depth k at slot i is the main head at slot i + offset(k) - 1 of the same forward:
both predict t_{i+offset(k)}. Nothing of a gradient goes to it.

Shapes: d the depths that are scored (1..D for most heads), n slots, V vocab.
"""

from abc import ABC, abstractmethod
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

REGISTRY: dict[str, type["Objective"]] = {}
# no name of an objective: what is logged as train/NAME/k or val/NAME/k in any case
TAKEN = {"acceptance", "agreement", "floor", "mtp_loss", "mtp_term", "mtp_weight", "overlap"}
TAKEN |= {"overlap_above_table", "top1"}


class Slots:
    """n slots as an objective sees them: all depths of a slot side by side, depth 1 first.

    What is computed from the logits is computed once, however many objectives ask for it.
    """

    def __init__(self, logits: Tensor, log_p: Tensor, targets: Tensor):
        self.logits = logits  # (d, n, V) of the heads, at least float32
        # (d, n, V) log-probabilities of the teacher; anything where there is no teacher
        self.log_p = log_p
        self.targets = targets  # (d, n)

    @cached_property
    def log_q(self) -> Tensor:
        """(d, n, V) log-probabilities of the heads."""
        return self.logits.log_softmax(-1)

    @cached_property
    def kl(self) -> Tensor:
        """(d, n): KL(p to q) = sum_v p(v) (log p(v) - log q(v))."""
        p = self.log_p.exp()
        return (p * self.log_p).sum(-1) - (p * self.log_q).sum(-1)

    @cached_property
    def log_overlap(self) -> Tensor:
        """(d, n): log sum_v min(p(v), q(v)), the log of the chance that a draft from q is accepted
        (arXiv 2211.17192). Formed from logarithms, or it would be 0 where p and q are far apart.
        """
        return torch.minimum(self.log_p, self.log_q).logsumexp(-1)


class Objective(ABC):
    """One objective. It has no parameters and no state."""

    name: ClassVar[str]
    """In `mtp.objective`, and in what is logged: train/NAME/k."""
    teacher: ClassVar[bool] = True
    """It compares with the main head: only slots that have a teacher count."""
    cross_entropy: ClassVar[bool] = False
    """It is the label's cross-entropy, which is computed, and logged as mtp_loss/k, in any case."""

    def __init_subclass__(cls, **settings: Any):
        super().__init_subclass__(**settings)
        if cls.__module__.startswith(__package__):
            REGISTRY[cls.name] = cls

    def counted(self, valid: Tensor) -> Tensor:
        """(D, ..) bool: the depths and slots that `loss` is summed over, among those with a valid
        label (and a teacher, if it needs one). Asked before any forward, to count them.
        """
        return valid

    @abstractmethod
    def loss(self, slots: Slots) -> Tensor:
        """(d, n), at least float32, finite everywhere. Rows of different slots may not meet: they
        lie in one call by chance.
        """


def checked_loss(objective: Objective, slots: Slots) -> Tensor:
    """`objective.loss`, of the shape and type that it owes, and with a gradient where there can be
    one.

    Raises:
        ValueError: it is something else.
    """
    before = slots.log_p._version
    value = objective.loss(slots)
    if slots.log_p._version != before:
        why = "the objectives after it read it too"
        raise ValueError(f"{_loss(objective)} writes into slots.log_p: {why}")
    if not isinstance(value, Tensor):
        raise ValueError(f"{_loss(objective)} gives a {type(value).__name__}, no tensor")
    if value.shape != slots.targets.shape:
        depths, count = slots.targets.shape
        shape = f"{list(value.shape)}, not [{depths}, {count}], one for each depth and slot"
        raise ValueError(f"{_loss(objective)} gives a tensor of shape {shape}")
    if value.dtype != torch.promote_types(value.dtype, torch.float32):
        raise ValueError(f"{_loss(objective)} gives {value.dtype}, not float32 or wider")
    if slots.logits.requires_grad and not value.requires_grad:
        why = "it reads neither slots.logits nor slots.log_q, or detaches them"
        raise ValueError(f"{_loss(objective)} has no gradient: {why}")
    return value


def checked_slots(objective: Objective, valid: Tensor) -> Tensor:
    """`objective.counted`, no more than `valid`.

    Raises:
        ValueError: it has not the shape and type of `valid`.
    """
    found = objective.counted(valid)
    if not isinstance(found, Tensor) or (found.shape, found.dtype) != (valid.shape, torch.bool):
        got = f"{found.dtype} {list(found.shape)}" if isinstance(found, Tensor) else repr(found)
        raise ValueError(
            f"mtp.objective: `counted` of {objective.name} must give a bool tensor of shape "
            f"{list(valid.shape)} (got {got})"
        )
    return found & valid


def _loss(objective: Objective) -> str:
    return f"mtp.objective: the loss of {objective.name}"
