"""What a head of a file of one's own gives to the losses, looked at where it comes in.

Raises ValueError, in one sentence that names the mode: further on it would be an index error, or
losses of other slots.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dsv3_mtp.config import MTPConfig
from dsv3_mtp.model.states import HeadOutput, HeadRows


def check_rows(mtp: MTPConfig, output: Any, shape: torch.Size, routers: int) -> None:
    """shape: (B, T) of the slots; routers: of the heads."""
    of = f"mtp.mode: {mtp.mode}: forward"
    if not isinstance(output, HeadOutput) or not all(
        isinstance(one, HeadRows) for one in output.rows
    ):
        raise ValueError(f"{of} must give a HeadOutput of HeadRows (got {type(output).__name__})")
    depths = [depth for one in output.rows for depth in one.depths]
    if len(set(depths)) != len(depths) or not set(depths) <= set(range(1, 1 + mtp.depths)):
        raise ValueError(f"{of} must give rows of depths 1..{mtp.depths}, each once (got {depths})")
    for one in output.rows:
        for x in one.inputs:
            if x.shape[:2] != shape:
                want = f"{tuple(shape)} and the width"
                raise ValueError(f"{of}: depth {one.depths} reads {tuple(x.shape)}, not {want}")
    if len(output.routed) != routers:
        has = f"gives the stats of {len(output.routed)} routers, and there are {routers}"
        raise ValueError(f"{of} {has}: every block that is called returns its own")


def check_counts(mtp: MTPConfig, counts: Any, terms: int) -> Tensor:
    if not isinstance(counts, Tensor) or counts.shape != (terms,):
        text = f"count_terms must give a tensor of shape ({terms},), a count for each of its terms"
        raise ValueError(f"mtp.mode: {mtp.mode}: {text} (got {_shown(counts)})")
    return counts


def check_terms(mtp: MTPConfig, found: Any, terms: Mapping[str, float]) -> None:
    of = f"mtp.mode: {mtp.mode}: loss_terms must give"
    if not isinstance(found, Mapping) or set(found) != set(terms):
        got = sorted(found) if isinstance(found, Mapping) else type(found).__name__
        raise ValueError(f"{of} the sums of {', '.join(terms)}, and nothing else (got {got})")
    for name, value in found.items():
        if not isinstance(value, Tensor) or value.shape != ():
            text = f"{name} as a tensor without dimensions, a sum (got {_shown(value)})"
            raise ValueError(f"{of} {text}")


def _shown(value: Any) -> Any:
    return tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
