"""lambda of V3 eq. 25 over the run, `mtp.loss_weight`: one file holds one kind of schedule, its
keys and its function.

Every file of this folder is imported and registers its class (base.py says what that is asked). A
schedule from elsewhere is named by `type: package.module:Class`.
"""

from typing import Annotated, Any

from pydantic import BeforeValidator, SerializeAsAny

from dsv3_mtp.config.loss_weights.base import LOSS_WEIGHTS, AdaptiveSchedule, LambdaSchedule, State
from dsv3_mtp.config.registry import import_all

import_all(__name__)


def _validate(value: Any) -> Any:
    """A bare number is a constant."""
    if value is None or isinstance(value, list | tuple | bool):
        raise ValueError("must be a number, or a schedule with a type")
    if not isinstance(value, dict | LambdaSchedule):
        value = {"type": "constant", "value": value}
    return LOSS_WEIGHTS.section(value)


LossWeight = Annotated[SerializeAsAny[LambdaSchedule], BeforeValidator(_validate)]
