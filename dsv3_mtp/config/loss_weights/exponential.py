"""`{type: exponential, start: 0.3, end: 0.03}`: the same factor in every equal part of the way."""

from typing import Literal

from dsv3_mtp.config.curves import position
from dsv3_mtp.config.loss_weights.base import LOSS_WEIGHTS
from dsv3_mtp.config.loss_weights.ramp import RampWeight
from dsv3_mtp.config.section import Positive


@LOSS_WEIGHTS.register
class ExponentialWeight(RampWeight):
    """start * (end / start)^x, x from 0 to 1 while progress goes from `begin` to `until`; constant
    outside. It never reaches 0: both numbers are > 0.
    """

    type: Literal["exponential"] = "exponential"
    start: Positive
    end: Positive

    def weight(self, progress: float) -> float:
        x = position(progress, self.begin, self.until)
        return self.start ** (1 - x) * self.end**x
