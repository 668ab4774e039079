"""An objective of one's own: KL(q to p), which punishes a draft that the main model would not make.

python tools/train.py --config configs/v3_tiny.yaml --set
'mtp.objective={examples.reverse_kl:ReverseKL: 1.0}'
"""

from torch import Tensor

from dsv3_mtp.objectives.base import Objective, Slots


class ReverseKL(Objective):
    """sum_v q(v) (log q(v) - log p(v)), p the main head's distribution, q the head's."""

    name = "reverse_kl"

    def loss(self, slots: Slots) -> Tensor:
        return (slots.log_q.exp() * (slots.log_q - slots.log_p)).sum(-1)
