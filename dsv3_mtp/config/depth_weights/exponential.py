"""`{type: exponential, beta: 0.6}`: near depths weigh more (FastMTP, arXiv 2509.18362)."""

from typing import Annotated, Literal

from pydantic import Field

from dsv3_mtp.config.depth_weights.base import DEPTH_WEIGHTS, DepthRule
from dsv3_mtp.config.section import Number


@DEPTH_WEIGHTS.register
class ExponentialDepths(DepthRule):
    """w_k = D beta^(k-1) / sum_j beta^(j-1), so that lambda / D sum_k w_k = lambda."""

    type: Literal["exponential"] = "exponential"
    beta: Annotated[Number, Field(gt=0, le=1)] = 0.6
    """Weight of a depth over that of the depth before it (FastMTP: 0.6); 1: all equal."""

    def weights(self, depths: int, progress: float) -> tuple[float, ...]:
        powers = [self.beta**k for k in range(depths)]
        return tuple(depths * power / sum(powers) for power in powers)
