"""`{type: linear, start: 0.3, end: 0.1, begin: 0.2, until: 0.8}`, and the same with `cosine`."""

from collections.abc import Iterator
from typing import Literal

from dsv3_mtp.config.curves import cosine, line, position
from dsv3_mtp.config.loss_weights.base import LOSS_WEIGHTS, LambdaSchedule
from dsv3_mtp.config.reader import Problem
from dsv3_mtp.config.section import Fraction, NotNegative


class RampWeight(LambdaSchedule):
    """From `start` to `end` while progress goes from `begin` to `until`; constant outside."""

    start: NotNegative
    end: NotNegative
    begin: Fraction = 0.0
    until: Fraction = 1.0

    def rules(self) -> Iterator[Problem]:
        if self.begin >= self.until:
            yield "until", f"must be > 'begin' = {self.begin} (got {self.until})"


@LOSS_WEIGHTS.register
class LinearWeight(RampWeight):
    """Along a straight line."""

    type: Literal["linear"] = "linear"

    def weight(self, progress: float) -> float:
        return line(self.start, self.end, position(progress, self.begin, self.until))


@LOSS_WEIGHTS.register
class CosineWeight(RampWeight):
    """Along half a wave of the cosine: slow at both ends."""

    type: Literal["cosine"] = "cosine"

    def weight(self, progress: float) -> float:
        return cosine(self.start, self.end, position(progress, self.begin, self.until))
