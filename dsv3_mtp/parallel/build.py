"""From a config to this rank's part of the model (all, a stage, its share of the experts, or shards
of each weight) and to the engine that trains it.
"""

import importlib.util
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import deepspeed
import torch
from torch import Tensor

from dsv3_mtp.config import Config
from dsv3_mtp.model.causal_lm import DeepseekV3MTP, meta_model
from dsv3_mtp.ops.compute import Compute, building
from dsv3_mtp.parallel.engine import Engine
from dsv3_mtp.parallel.experts import LocalExperts, local_experts
from dsv3_mtp.parallel.launch import World
from dsv3_mtp.parallel.pipeline import PipelineEngine, stage_parts
from dsv3_mtp.parallel.sequence import shard_of
from dsv3_mtp.precision.stored import is_codes


def build_model(
    config: Config, ds_config: dict[str, Any], world: World, compute: Compute | None = None
) -> DeepseekV3MTP:
    """The model at its random start, equal for every layout of the ranks.

    No rank ever holds more than its part and one whole matrix, or one expert.

    Args:
        compute: kernels and precision; None: torch's for this device. The layout's part of it,
        shards and experts, is added here.
    """
    with building(laid_out(compute or Compute(), config, world)):
        return _build(config, ds_config, world)


def laid_out(compute: Compute, config: Config, world: World) -> Compute:
    """What a model computes with in this layout. All ranks call it together."""
    shard, size = shard_of(world), config.parallel.expert_parallel_size
    make = local_experts(size, pipeline_stages=world.stages) if size > 1 else None

    def place(part: Compute) -> Compute:
        core, recompute = shard.attention(part.core), config.train.activation_checkpointing
        return replace(part, core=core, experts=make, shard=shard, recompute=recompute)

    heads = None if compute.heads is None else place(compute.heads)
    return replace(place(compute), heads=heads)


def _build(config: Config, ds_config: dict[str, Any], world: World) -> DeepseekV3MTP:
    torch.manual_seed(config.run.seed)
    if config.parallel.zero_stage == 3:  # every module is sharded as soon as it is made
        with deepspeed.zero.Init(config_dict_or_path=ds_config), world.device:
            model = DeepseekV3MTP(config.model, config.mtp)
    else:
        model = meta_model(config.model, config.mtp, freeze=config.train.freeze)
        # What DeepSpeed turns the others into later: a frozen weight has no float32 master, and
        # a trunk that is made in float32 would need twice the memory once, at the start.
        for parameter in model.parameters():
            if not parameter.requires_grad and not is_codes(parameter):
                parameter.data = parameter.data.to(getattr(torch, config.train.dtype))
        for part in stage_parts(config, model, world) if world.stages > 1 else [model]:
            part.to_empty(device=world.device)
        for module in model.modules():
            if isinstance(module, LocalExperts):
                module.mark()
    model.init_weights(config.run.seed, writable=writable)
    return model


def check_monitors(config: Config) -> None:
    """A missing package would otherwise fail on rank 0 alone and leave the other ranks waiting."""
    wanted = {"tensorboard": config.log.tensorboard, "wandb": config.log.wandb is not None}
    missing = [
        name for name, wants in wanted.items() if wants and importlib.util.find_spec(name) is None
    ]
    if missing:
        raise ValueError(
            "\n".join(
                f"log.{name}: the package is not installed; pip install {name}" for name in missing
            )
        )


def start_engine(
    model: DeepseekV3MTP, optimizer: Any, ds_config: dict, world: World, config: Config
) -> Engine:
    """What DeepSpeed says against a `deepspeed:` section becomes a ValueError that names it."""
    start: dict[str, Any] = {"ds_config": ds_config, "world": world}
    start["apart"] = config.optim.grad_clip if config.clips_apart else None
    try:
        if world.stages > 1:
            return PipelineEngine(model, optimizer, config=config, **start)
        return Engine(model, optimizer, **start)
    except Exception as error:
        if not config.deepspeed:
            raise
        raise ValueError(f"deepspeed: DeepSpeed refuses this section: {error}") from error


def writable(tensor: Tensor) -> AbstractContextManager[Any]:
    """Where the whole tensor is there to be written, the same by all ranks; for ZeRO-3."""
    return deepspeed.zero.GatheredParameters(tensor, modifier_rank=0)
