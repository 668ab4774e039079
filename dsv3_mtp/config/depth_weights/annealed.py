"""`{type: annealed, ratio: 0.5}`: the last depth is given up first (modded-nanogpt, PR 178)."""

from typing import Annotated, Literal

from pydantic import Field

from dsv3_mtp.config.depth_weights.base import DEPTH_WEIGHTS, DepthRule
from dsv3_mtp.config.section import Number


@DEPTH_WEIGHTS.register
class AnnealedDepths(DepthRule):
    """D + 1 equal stages: in stage s depth D+1-s falls linearly to 0, deeper ones are 0, nearer
    ones keep w_k = D ratio^(k-1) / sum_j ratio^(j-1). In the last stage the main loss is alone.
    """

    type: Literal["annealed"] = "annealed"
    ratio: Annotated[Number, Field(gt=0, le=1)] = 0.5
    """Weight of a depth over that of the depth before it, at the start (modded-nanogpt: 0.5)."""

    def weights(self, depths: int, progress: float) -> tuple[float, ...]:
        powers = [self.ratio**k for k in range(depths)]
        left = depths - progress * (depths + 1)  # how many depths, the one that falls in part
        return tuple(
            depths * power / sum(powers) * min(max(left - k, 0.0), 1.0)
            for k, power in enumerate(powers)
        )
