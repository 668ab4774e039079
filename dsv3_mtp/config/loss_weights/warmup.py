"""`{type: warmup, value: 0.3, until: 0.2}`."""

from typing import Annotated, Literal

from pydantic import Field

from dsv3_mtp.config.curves import line, position
from dsv3_mtp.config.loss_weights.base import LOSS_WEIGHTS, LambdaSchedule
from dsv3_mtp.config.section import NotNegative, Number


@LOSS_WEIGHTS.register
class WarmupWeight(LambdaSchedule):
    """From 0 to `value` while progress goes from 0 to `until`; then constant."""

    type: Literal["warmup"] = "warmup"
    value: NotNegative
    until: Annotated[Number, Field(gt=0, le=1)]

    def weight(self, progress: float) -> float:
        return line(0.0, self.value, position(progress, 0.0, self.until))
