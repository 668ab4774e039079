"""The interface of a rule for the weights of the depths."""

from abc import abstractmethod

from dsv3_mtp.config.registry import Registry
from dsv3_mtp.config.section import Section


class DepthRule(Section):
    """w_1 .. w_D as a function of D and of progress. Its keys are the fields of the class."""

    type: str

    @abstractmethod
    def weights(self, depths: int, progress: float) -> tuple[float, ...]:
        """(D,) numbers >= 0; their mean is 1 where lambda shall keep its meaning."""


DEPTH_WEIGHTS: Registry[DepthRule] = Registry("rule of depth weights", DepthRule)
