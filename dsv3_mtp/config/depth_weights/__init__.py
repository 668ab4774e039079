"""w_k of V3 eq. 25 over the depths, `mtp.depth_weights`: a list of numbers, or a rule from this
folder or from elsewhere (`type: package.module:Class`).
"""

from typing import Annotated, Any

from pydantic import BeforeValidator, Discriminator, SerializeAsAny, Tag

from dsv3_mtp.config.depth_weights.base import DEPTH_WEIGHTS, DepthRule
from dsv3_mtp.config.registry import import_all
from dsv3_mtp.config.section import NotNegative

import_all(__name__)


def _list_or_rule(value: Any) -> str:
    return "<rule>" if isinstance(value, dict | DepthRule) else "<list>"


DepthWeights = Annotated[
    Annotated[tuple[NotNegative, ...], Tag("<list>")]
    | Annotated[SerializeAsAny[DepthRule], BeforeValidator(DEPTH_WEIGHTS.section), Tag("<rule>")],
    Discriminator(_list_or_rule),
]
