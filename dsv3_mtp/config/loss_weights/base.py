"""What the training loop asks of a schedule of lambda."""

from abc import abstractmethod
from typing import Any

from dsv3_mtp.config.registry import Registry
from dsv3_mtp.config.section import Section

State = dict[str, Any]  # what JSON holds: it is saved in checkpoints


class LambdaSchedule(Section):
    """lambda as a pure function of progress. Its keys are the fields of the class.

    A threshold belongs to what follows it: at exactly 10T of 14.8T tokens V3's lambda is already
    0.1.
    """

    type: str

    @abstractmethod
    def weight(self, progress: float) -> float:
        """lambda >= 0 of a step. progress: share of train.total_tokens consumed before it."""


class AdaptiveSchedule(LambdaSchedule):
    """lambda from what the run has measured: the state is made from the metrics of earlier steps.

    The three methods are pure functions. The state is kept by the trainer. It is saved in every
    checkpoint, and is the same on all ranks. Study arms that have one share no steps with other
    arms.
    """

    @abstractmethod
    def first_state(self) -> State:
        """The state before the first step."""

    @abstractmethod
    def next_state(self, state: State, metrics: dict[str, float]) -> State:
        """The state after a step. metrics: what metrics.jsonl would say of this step, sums over all
        ranks: train/main_loss, train/mtp_loss/k, train/top1/k, optim/grad_norm, ...
        """

    @abstractmethod
    def weight_in(self, state: State, progress: float) -> float:
        """lambda >= 0 of the coming step."""

    def weight(self, progress: float) -> float:
        """In the state before the first step: what can be said without a run."""
        return self.weight_in(self.first_state(), progress)


LOSS_WEIGHTS: Registry[LambdaSchedule] = Registry("loss-weight schedule", LambdaSchedule)
