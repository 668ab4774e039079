"""How ranks share the work: what each layout needs, and which combinations are refused, each with its reason.

A rule yields (key, text), as the rules of the sections do. Rules that need no number of ranks are checked when a
config is read; all of them when a run starts, and by `--dry-run`.
"""

from collections.abc import Iterator
from typing import Any

from dsv3_mtp.config.reader import Problem

NEEDS = ("model", "mtp", "data", "train", "parallel")  # the sections that the rules read


def refusals(config: Any, world_size: int | None = None) -> list[str]:
    """Every reason why this config cannot run on `world_size` ranks, as "key: text". None: on any number of ranks.

    config: a Config, or anything with the sections in NEEDS.
    """
    return [f"{key}: {text}" for key, text in problems(config, world_size)]


def problems(config: Any, world_size: int | None = None) -> Iterator[Problem]:
    yield from _zero(config)
    yield from _experts(config)
    yield from _task(config)
    if world_size is not None:
        yield from _ranks(config, world_size)


def _zero(config: Any) -> Iterator[Problem]:
    parallel = config.parallel
    if parallel.offload_optimizer and parallel.zero_stage == 0:
        yield "parallel.offload_optimizer", "needs parallel.zero_stage >= 1: ZeRO-0 has no optimizer shard to move"


def _experts(config: Any) -> Iterator[Problem]:
    model, size, stage = config.model, config.parallel.expert_parallel_size, config.parallel.zero_stage
    if size == 1:
        return
    key = "parallel.expert_parallel_size"
    if model.n_routed_experts % size:
        yield key, f"must divide model.n_routed_experts = {model.n_routed_experts} (got {size})"
    if size % model.n_group and model.n_group % size:
        yield key, f"must divide model.n_group = {model.n_group}, whose groups are nodes, or be a multiple (got {size})"
    if model.first_k_dense_replace == model.num_hidden_layers:
        yield key, f"has no experts to share with model.first_k_dense_replace = {model.num_hidden_layers}; set 1"
    if config.train.freeze == "trunk" and config.mtp.mode == "parallel_linear":
        yield key, "has no experts that learn with train.freeze: trunk and mtp.mode: parallel_linear; set 1"
    if stage == 0:
        yield key, "needs parallel.zero_stage 1 or 2: DeepSpeed's ZeRO-0 clips by each rank's own gradient norm (got 0)"
    if stage == 3:
        yield key, "needs parallel.zero_stage 1 or 2: DeepSpeed's ZeRO-3 takes no expert-parallel groups (got 3)"


def _task(config: Any) -> Iterator[Problem]:
    """Its examples are answered by generation during training, and that needs a whole model on each rank."""
    parallel = config.parallel
    if config.data.task is not None and (parallel.zero_stage == 3 or parallel.expert_parallel_size > 1):
        yield "data.task", "needs parallel.zero_stage <= 2 and expert_parallel_size 1: every rank generates by itself"


def _ranks(config: Any, world_size: int) -> Iterator[Problem]:
    train, experts = config.train, config.parallel.expert_parallel_size
    if world_size % experts:
        yield "parallel.expert_parallel_size", f"must divide the number of ranks, {world_size} (got {experts})"
    rows = train.micro_batch_size * world_size
    if train.batch_size % rows:
        yield (
            "train.batch_size",
            f"{train.batch_size} sequences do not divide into micro-batches of "
            f"{train.micro_batch_size} on {world_size} ranks; use a multiple of {rows}",
        )
