"""lambda that follows the run: the extra losses together are a fixed share of the main loss.

    dsv3 train --config v3_nano.yaml \\
        --set 'mtp.loss_weight={type: "examples.loss_ratio:LossRatio", share: 0.3, first: 0.3}'
"""

from typing import Annotated

from pydantic import Field

from dsv3_mtp.config import AdaptiveSchedule
from dsv3_mtp.config.section import NotNegative, Positive


class LossRatio(AdaptiveSchedule):
    """lambda = share * L_main / mean_k L_k, with both losses smoothed over the steps so far.

    The heads' losses are higher than the main loss, and come down later: with a constant lambda
    their share of the total loss changes over the run. Here it does not.
    """

    share: Positive
    """lambda / D * sum_k L_k over L_main, which is held."""
    first: NotNegative
    """lambda of the first step, before there is a loss."""
    smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay per step of the two averages."""

    def first_state(self):
        return {"main": None, "heads": None}

    def next_state(self, state, metrics):
        heads = [value for name, value in metrics.items() if name.startswith("train/mtp_loss/")]
        losses = {"main": metrics["train/main_loss"], "heads": sum(heads) / max(len(heads), 1)}
        if state["main"] is None:
            return losses
        keep = self.smoothing
        return {name: keep * state[name] + (1 - keep) * losses[name] for name in losses}

    def weight_in(self, state, progress):
        if not state["heads"]:
            return self.first
        return self.share * state["main"] / state["heads"]
