"""Distillation from the main head (DistillSpec, arXiv 2310.08461; MTP-D, arXiv 2603.23911)."""

from torch import Tensor

from dsv3_mtp.objectives.base import Objective, Slots


class KL(Objective):
    """KL(p to q) = sum_v p(v) (log p(v) - log q(v)), p the teacher, q the head.

    Its minimum over q that see less than the teacher is the mean of p, as for cross-entropy: it has
    the same optimum with less noise in the gradient.
    """

    name = "kl"

    def loss(self, slots: Slots) -> Tensor:
        return slots.kl
