"""Gradient norms of the trunk and of the heads, one for each, and clipping to one bound for each.

DeepSpeed clips the norm of all gradients together. Heads with large gradients then shorten the
trunk's steps, even where their gradients do not reach the trunk. Where heads must not touch the
trunk (`mtp.detach: all`), DeepSpeed's own clipping is off, and `clip_apart` scales the gradients of
trunk and heads by a factor each. Both kinds of parameters are in groups of their own then, so that
ZeRO lays out the trunk's as if there were no heads: the trunk's update is that of `mtp.mode: none`,
bit for bit on one process and with ZeRO 1 and 2.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.utils import (
    clip_grad_norm_,
    combine_grad_norm_groups,
    get_global_norm_of_tensors,
)
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor, nn

from dsv3_mtp.parallel.placement import masters

SIDES = ("trunk", "mtp")
_TINY = 1e-6  # DeepSpeed's: added to a norm before it divides


def side_norms(model: Any, engine: Any) -> dict[str, float]:
    """Norms of the averaged gradients of trunk and heads, over all ranks; `{}` without heads.

    Call it between the last backward of a step and the update. model: DeepseekV3MTP; engine:
    DeepSpeed's.
    """
    if not model.depths:
        return {}
    return dict(zip(SIDES, _generic_norms(model, engine).tolist(), strict=True))


def clip_apart(model: Any, engine: Any, limit: float) -> dict[str, float]:
    """Clips the gradients of trunk and heads to norms of at most `limit` each, in the coming
    update.

    Returns the norms before that. `scale_gradients` must be the optimizer's hook.
    """
    optimizer = engine.optimizer
    if isinstance(optimizer, torch.optim.Optimizer):  # ZeRO-0 in float32, scaled here and now
        return {
            side: float(clip_grad_norm_(_parameters(model, side), limit, mpu=engine.mpu))
            for side in SIDES
        }
    if isinstance(optimizer, BF16_Optimizer):
        norms = (
            _generic_norms(model, engine) if optimizer.has_moe_layers else _float32_norms(optimizer)
        )
        scales = torch.clamp(limit / (norms.float() + _TINY), max=1.0)
    else:
        exact = isinstance(optimizer, DeepSpeedZeroOptimizer) and not (
            optimizer.cpu_offload
            or optimizer.has_moe_layers
            or optimizer.model_parallel_world_size > 1
        )
        norms = _deepspeeds_norms(optimizer) if exact else _generic_norms(model, engine)
        scales = 1.0 / torch.clamp((norms.float() + _TINY) / limit, min=1.0)
    for group in optimizer.param_groups:
        group["grad_scale"] = scales[SIDES.index(group["side"])]
    return dict(zip(SIDES, norms.tolist(), strict=True))


def scale_gradients(optimizer: torch.optim.Optimizer, _args: Any, _keywords: Any) -> None:
    """Hook before an optimizer's step: applies the factors of `clip_apart`, in the optimizer's own
    precision, where DeepSpeed would apply its factor.
    """
    for group in optimizer.param_groups:
        if "grad_scale" in group:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.mul_(group["grad_scale"])


def _parameters(model: Any, side: str) -> list[nn.Parameter]:
    heads = {id(parameter) for parameter in model.mtp.parameters()}
    return [p for p in model.parameters() if (id(p) in heads) == (side == "mtp")]


def _deepspeeds_norms(optimizer: DeepSpeedZeroOptimizer) -> Tensor:
    """(2,) as ZeRO 1 and 2 compute the norm that they clip by, for the groups of each side."""
    by_side: dict[str, list[Tensor]] = {side: [] for side in SIDES}
    for number, group in enumerate(optimizer.param_groups):
        gradients, parameters = optimizer.averaged_gradients, optimizer.params_in_partition
        norm = optimizer.get_grad_norm_direct(gradients[number], parameters[number])
        by_side[group["side"]].append(norm)
    return torch.stack([combine_grad_norm_groups(norms) for norms in by_side.values()])


def _float32_norms(optimizer: BF16_Optimizer) -> Tensor:
    """(2,) as ZeRO-1 computes the norm of float32 sums. Every rank has all of the sums."""
    by_side: dict[str, list[Tensor]] = {side: [] for side in SIDES}
    for group, gradients in zip(
        optimizer.param_groups, optimizer.fp32_groups_gradients, strict=True
    ):
        by_side[group["side"]] += gradients
    return torch.stack([get_global_norm_of_tensors(found) for found in by_side.values()])


def _generic_norms(model: Any, engine: Any) -> Tensor:
    """(2,) float64, in any layout: squares of what each rank holds, summed over the ranks."""
    heads = {id(parameter) for parameter in model.mtp.parameters()}
    sums: list[list[Tensor]] = [[], []]
    for parameter, gradient in _gradients(engine):
        if not getattr(parameter, "ds_pipe_replicated", False):  # the first stage counts a tied one
            sums[id(parameter) in heads].append(
                torch.linalg.vector_norm(gradient, dtype=torch.float32).double().square()
            )
    device = next(p.device for p in model.parameters() if not p.is_meta)
    zero = torch.zeros((), dtype=torch.float64, device=device)
    total = torch.stack([sum(squares, start=zero) for squares in sums])
    dist.all_reduce(total)
    if engine.zero_optimization_stage() == 0:  # every rank of a stage holds all of its gradients
        total /= dist.get_world_size(group=engine.data_parallel_group)
    return total.sqrt()


def _gradients(engine: Any) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """What this rank holds of the averaged gradients, before the update: parameter, its part."""
    optimizer = engine.optimizer
    by_id = {id(parameter): parameter for parameter in engine.module.parameters()}
    offloaded = getattr(optimizer, "cpu_offload", False) or getattr(
        optimizer, "offload_optimizer", False
    )
    if isinstance(optimizer, DeepSpeedZeroOptimizer) and not offloaded:
        for number, parameters in enumerate(optimizer.params_in_partition):
            gradients = optimizer.averaged_gradients[number]
            own = [g for g in gradients if not getattr(g, "_zero_padding", False)]
            yield from zip(parameters, own, strict=False)
    elif isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3) and not offloaded:
        for number, parameters in enumerate(optimizer.fp16_groups):
            yield from zip(parameters, optimizer.averaged_gradients[number], strict=True)
    elif isinstance(optimizer, BF16_Optimizer):
        flats, grads = (
            optimizer.fp32_groups_flat_partition,
            optimizer.fp32_groups_gradient_flat_partition,
        )
        gradient_of = {id(flat): grad for flat, grad in zip(flats, grads, strict=True)}
        for number, part in masters(optimizer):
            gradient = gradient_of[id(part.flat)]
            yield by_id[number], gradient[part.at : part.at + part.numel]
    elif offloaded:
        for number, part in masters(optimizer):
            if part.flat.grad is not None:
                yield by_id[number], part.flat.grad[part.at : part.at + part.numel]
    else:
        yield from ((p, p.grad) for p in by_id.values() if p.grad is not None)


def clipped(norm: float, limit: float) -> bool:
    """Whether a gradient of this norm is shortened."""
    return limit > 0 and not math.isnan(norm) and norm > limit
