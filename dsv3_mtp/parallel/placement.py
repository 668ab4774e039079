"""Which ranges of which tensors this rank holds: the layout of a run, in terms that no layout
shares.

A tensor's canonical name and shape are those of an unsharded DeepseekV3MTP. Every layout keeps the
names: a pipeline stage has storage for some of the tensors, expert parallelism for a range of a
layer's experts. ZeRO splits the rest; what its optimizers hold is read here in the terms of
DeepSpeed 0.19.8. DeepSpeed's own view of that, `param._hp_mapping`, does not know ZeRO 0 and 3, and
is wrong under round_robin_gradients.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor

from dsv3_mtp.model.moe import Experts
from dsv3_mtp.parallel import private

if TYPE_CHECKING:  # the engine imports clip.py, which imports this
    from dsv3_mtp.parallel.engine import Engine

# Several ranks may hold the same tensor. Below this many elements the first of them writes it.
SHARE = 1 << 16


class TensorShard(NamedTuple):
    """The range [start, start + numel) of a flattened tensor, which is here in `flat[at:]`."""

    name: str
    shape: tuple[int, ...]  # of the whole tensor
    start: int
    numel: int
    # what the optimizer steps on (float32); of frozen parameters and buffers: their own values
    flat: Tensor
    at: int
    # (start, stop) within the whole tensor. Several ranks may hold the same elements; this rank
    # writes these of them.
    share: tuple[int, int]

    def of(self, flat: Tensor) -> Tensor:
        """The range in `flat`, or in a tensor that the optimizer keeps beside it."""
        return flat.detach().view(-1)[self.at : self.at + self.numel]


class _Range(NamedTuple):
    """Elements [start, start + numel) of a flattened local parameter, in `flat[at:]`."""

    flat: Tensor
    at: int
    start: int
    numel: int


def tensor_shards(engine: "Engine") -> Iterator[TensorShard]:
    """What this rank holds: masters of what it updates, frozen parameters, buffers."""
    model, optimizer = engine.model, engine.engine.optimizer
    updated = dict(masters(optimizer))
    layers = [part for part in model.modules() if isinstance(part, Experts)]
    first = {
        id(tensor): layer.first
        for layer in layers
        for tensor in (*layer.parameters(), *layer.buffers())
    }
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_meta:
            continue  # of another pipeline stage
        if tensor.requires_grad:
            found = updated.get(id(tensor))
            sharded = not isinstance(optimizer, torch.optim.Optimizer | FP16_UnfusedOptimizer)
        else:
            found, sharded = _whole(tensor), hasattr(tensor, "ds_id")
        if found is None:
            continue  # another rank updates it
        shape, start = tuple(getattr(tensor, "ds_shape", tensor.shape)), found.start
        if id(tensor) in first:
            start += first[id(tensor)] * math.prod(shape[1:])
            shape = (model.config.n_routed_experts, *shape[1:])
        share = (
            (0, found.numel) if sharded else _share(found.numel, _replicas(engine.engine, tensor))
        )
        if getattr(tensor, "ds_pipe_replicated", False):
            share = (0, 0)  # the first stage that has this tied parameter writes it
        yield TensorShard(name, shape, start, found.numel, found.flat, found.at, share)


def masters(optimizer: Any) -> Iterator[tuple[int, _Range]]:
    """(id of a parameter, the range of it that this rank updates)."""
    if isinstance(optimizer, DeepSpeedZeroOptimizer):
        flats = (
            optimizer.bit16_groups,
            optimizer.bit16_groups_flat,
            optimizer.single_partition_of_fp32_groups,
        )
        yield from _flattened(*flats, optimizer.real_dp_process_group)
    elif isinstance(optimizer, BF16_Optimizer):
        flats = (
            optimizer.bf16_groups,
            optimizer.bf16_groups_flat,
            optimizer.fp32_groups_flat_partition,
        )
        yield from _flattened(*flats, optimizer.real_dp_process_group)
    elif isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        for parameters, flat in zip(
            optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True
        ):
            at = 0
            for parameter in parameters:
                start, numel = _zero3_range(parameter)
                yield id(parameter), _Range(flat, at, start, numel)
                at += parameter.partition_numel()
    elif isinstance(optimizer, FP16_UnfusedOptimizer):  # of ZeRO-0 in bfloat16
        for parameters, flats in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
            for parameter, flat in zip(parameters, flats, strict=True):
                yield id(parameter), _Range(flat, 0, 0, flat.numel())
    elif isinstance(optimizer, torch.optim.Optimizer):  # ZeRO-0 in float32
        for parameter in (
            parameter for group in optimizer.param_groups for parameter in group["params"]
        ):
            yield id(parameter), _Range(parameter, 0, 0, parameter.numel())
    else:
        raise TypeError(f"checkpoints do not know DeepSpeed's {type(optimizer).__name__}")


def _flattened(
    parameters: list, flats: list, partitions: list, ranks: list
) -> Iterator[tuple[int, _Range]]:
    """ZeRO 1 and 2: a parameter group in one flat tensor, an equal part on each rank."""
    for group, flat, partition, peers in zip(parameters, flats, partitions, ranks, strict=True):
        first = dist.get_rank(group=peers) * partition.numel()
        for parameter in group:
            begin = parameter.data.storage_offset() - flat.storage_offset()
            start, stop = (
                max(begin, first),
                min(begin + parameter.numel(), first + partition.numel()),
            )
            if start < stop:
                yield id(parameter), _Range(partition, start - first, start - begin, stop - start)


def _zero3_range(parameter: Any) -> tuple[int, int]:
    """(start, numel) of this rank's partition of a ZeRO-3 parameter, without its padding."""
    size = parameter.partition_numel()
    start = min(dist.get_rank(group=parameter.ds_process_group) * size, parameter.ds_numel)
    return start, min(size, parameter.ds_numel - start)


def _whole(tensor: Any) -> _Range:
    if hasattr(tensor, "ds_id"):
        return _Range(tensor.ds_tensor, 0, *_zero3_range(tensor))
    return _Range(tensor, 0, 0, tensor.numel())


def _replicas(engine: Any, tensor: Tensor) -> Any:
    """The ranks that hold the same whole tensor."""
    if getattr(tensor, "allreduce", True):
        return engine.data_parallel_group
    return private.expert_replicas(tensor.group_name)  # type: ignore[attr-defined]


def _share(numel: int, peers: Any) -> tuple[int, int]:
    chunk = max(-(-numel // dist.get_world_size(group=peers)), SHARE)
    start = min(dist.get_rank(group=peers) * chunk, numel)
    return start, min(start + chunk, numel)


@contextmanager
def restoring(engine: "Engine") -> Iterator[None]:
    """Around writing into `tensor_shards`: the weights then follow their masters."""
    optimizer = engine.engine.optimizer
    zero3 = isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3)
    if zero3:
        optimizer.checkpoint_event_prologue()  # no parameter stays gathered
    yield
    if zero3:
        for parameters, flat in zip(
            optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True
        ):
            masters = flat.detach().split([parameter.partition_numel() for parameter in parameters])
            for parameter, master in zip(parameters, masters, strict=True):
                parameter.ds_tensor.data.copy_(master)
        optimizer.checkpoint_event_epilogue()
    elif isinstance(optimizer, DeepSpeedZeroOptimizer | BF16_Optimizer):
        optimizer.update_lp_params()
    elif isinstance(optimizer, FP16_UnfusedOptimizer):
        for parameters, masters in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
            for parameter, master in zip(parameters, masters, strict=True):
                parameter.data.copy_(master.data)
