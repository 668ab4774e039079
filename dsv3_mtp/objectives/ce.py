"""Cross-entropy with the label, the objective of DeepSeek-V3 (eq. 24) and of Meta's heads."""

from torch import Tensor

from dsv3_mtp.objectives.base import Objective, Slots


class CrossEntropy(Objective):
    """-log q(t_{i+k+1}).

    Training never calls `loss`: ops/cross_entropy.py has the gradient by hand, and its value is
    wanted as mtp_loss/k in any case. The two are compared in a test.
    """

    name = "ce"
    teacher = False
    cross_entropy = True

    def loss(self, slots: Slots) -> Tensor:
        return -slots.log_q.gather(-1, slots.targets.unsqueeze(-1)).squeeze(-1)
