"""`{type: piecewise, points: [[0, 0.3], [0.5, 0.3], [1, 0.05]]}`."""

from collections.abc import Iterator
from itertools import pairwise
from typing import Literal

from dsv3_mtp.config.curves import line, position
from dsv3_mtp.config.loss_weights.base import LOSS_WEIGHTS, LambdaSchedule
from dsv3_mtp.config.reader import Problem, show
from dsv3_mtp.config.section import Fraction, NotNegative


@LOSS_WEIGHTS.register
class PiecewiseWeight(LambdaSchedule):
    """Straight lines through [progress, value] points; constant outside."""

    type: Literal["piecewise"] = "piecewise"
    points: tuple[tuple[Fraction, NotNegative], ...]

    def rules(self) -> Iterator[Problem]:
        if len(self.points) < 2:
            yield "points", f"must hold at least two points (got {show(self.points)})"
        at = [progress for progress, _ in self.points]
        if at != sorted(set(at)):
            yield "points", f"must be in order of progress, none twice (got {show(at)})"

    def weight(self, progress: float) -> float:
        if progress <= self.points[0][0]:
            return self.points[0][1]
        for (begin, start), (end, value) in pairwise(self.points):
            if progress < end:
                return line(start, value, position(progress, begin, end))
        return self.points[-1][1]
