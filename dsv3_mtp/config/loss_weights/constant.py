"""`{type: constant, value: 0.3}`, or the bare number."""

from typing import Literal

from dsv3_mtp.config.loss_weights.base import LOSS_WEIGHTS, LambdaSchedule
from dsv3_mtp.config.section import NotNegative


@LOSS_WEIGHTS.register
class ConstantWeight(LambdaSchedule):
    """lambda = value."""

    type: Literal["constant"] = "constant"
    value: NotNegative

    def weight(self, progress: float) -> float:
        return self.value
