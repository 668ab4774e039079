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

from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

REGISTRY: dict[str, type["Objective"]] = {}


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


class Objective:
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

    def loss(self, slots: Slots) -> Tensor:
        """(d, n), at least float32, finite everywhere. Rows of different slots may not meet: they
        lie in one call by chance.
        """
        raise NotImplementedError
