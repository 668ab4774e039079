"""Objectives that optimise the acceptance of drafts itself.

overlap = sum_v min(p(v), q(v)) is the probability that a draft from q is accepted by the main
model, whose distribution is p (arXiv 2211.17192); total variation TV(p, q) = 1 - overlap.

Published weights are converted: DeepSpec's L1 = sum_v |p(v) - q(v)| is 2 tv, so that its
0.1 CE + 0.9 L1 is {ce: 0.1, tv: 1.8}.
"""

from torch import Tensor

from dsv3_mtp.objectives.base import Objective, Slots

ETA = 3.0  # of lk_hybrid (arXiv 2602.23881)


class TV(Objective):
    """1 - overlap (arXiv 2606.12370). Heads that start at random hardly move under it: its gradient
    on a token is at most q of that token.
    """

    name = "tv"

    def loss(self, slots: Slots) -> Tensor:
        return 1 - slots.log_overlap.exp()


class LK(Objective):
    """-log overlap (LK-alpha of arXiv 2602.23881): the gradient of TV over the overlap, so that
    slots with little overlap weigh more.
    """

    name = "lk"

    def loss(self, slots: Slots) -> Tensor:
        return -slots.log_overlap


class LKHybrid(Objective):
    """w KL(p to q) + (1 - w) TV with w = exp(-3 overlap), detached (LK-lambda of arXiv 2602.23881):
    KL where the overlap is small, TV where it is large. w is of each slot and depth: there is no
    state.
    """

    name = "lk_hybrid"

    def loss(self, slots: Slots) -> Tensor:
        overlap = slots.log_overlap.exp()
        w = (-ETA * overlap.detach()).exp()
        return w * slots.kl + (1 - w) * (1 - overlap)
