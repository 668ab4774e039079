"""`{type: step, values: [0.3, 0.1], at: [0.6757]}`: V3's own schedule (V3 4.2)."""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from dsv3_mtp.config.loss_weights.base import LOSS_WEIGHTS, LambdaSchedule
from dsv3_mtp.config.reader import Problem, show
from dsv3_mtp.config.section import NotNegative, Number


@LOSS_WEIGHTS.register
class StepWeight(LambdaSchedule):
    """values[i], where i counts the fractions `at` that progress has reached (V3 4.2)."""

    type: Literal["step"] = "step"
    values: tuple[NotNegative, ...]
    at: tuple[Annotated[Number, Field(gt=0, lt=1)], ...]

    def rules(self) -> Iterator[Problem]:
        if len(self.values) != len(self.at) + 1:
            got = f"(got {len(self.values)} and {len(self.at)})"
            yield "values", f"must hold one number more than 'at' {got}"
        if list(self.at) != sorted(set(self.at)):
            yield "at", f"must increase (got {show(self.at)})"

    def weight(self, progress: float) -> float:
        return self.values[sum(progress >= at for at in self.at)]
