"""Every private name of DeepSpeed and torch that this folder uses, and nothing else uses any.

A release may rename them without a word. tests/parallel/test_private.py looks for each of them; the
bounds in pyproject.toml are the releases that have been looked at.
"""

import contextlib
import importlib
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import deepspeed.ops
import deepspeed.runtime.zero.utils
import torch.distributed
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils import groups

# What placement.py and clip.py read of DeepSpeed's optimizers: fields without an underscore, and
# without a promise.
FIELDS: dict[type, tuple[str, ...]] = {
    DeepSpeedZeroOptimizer: (
        *("bit16_groups", "bit16_groups_flat", "single_partition_of_fp32_groups"),
        *("real_dp_process_group", "update_lp_params", "cpu_offload", "has_moe_layers"),
        *("model_parallel_world_size", "averaged_gradients", "params_in_partition"),
        *("get_grad_norm_direct",),
    ),
    BF16_Optimizer: (
        *("bf16_groups", "bf16_groups_flat", "fp32_groups_flat_partition", "real_dp_process_group"),
        *("update_lp_params", "clear_lp_grads", "fp32_groups_gradients"),
        *("fp32_groups_gradient_flat_partition", "has_moe_layers", "update_hp_grads"),
    ),
    DeepSpeedZeroOptimizer_Stage3: (
        *("fp16_groups", "fp32_partitioned_groups_flat", "averaged_gradients", "offload_optimizer"),
        *("checkpoint_event_prologue", "checkpoint_event_epilogue"),
    ),
    FP16_UnfusedOptimizer: ("fp16_groups", "fp32_groups"),
}
TIMEOUTS = ("default_pg_timeout", "default_pg_nccl_timeout")  # of torch.distributed


def without_shm_all_reduce() -> None:
    """An inference-only all-reduce: every start on a CPU would compile it for 45 s, or hang on it
    after a killed build.
    """
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def without_output_warning() -> None:
    """ZeRO-3 would warn that it cannot look into MTPOutput, of a module without weights."""
    deepspeed.runtime.zero.utils.warned = True


def import_muon() -> None:
    """The module that DeepSpeed imports on every start, only to find another optimizer in use."""
    importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")


@contextlib.contextmanager
def default_timeout(seconds: float) -> Iterator[None]:
    """torch's timeout of process groups that are made without one: DeepSpeed's sub-groups."""
    c10d = torch.distributed.distributed_c10d
    before = {name: getattr(c10d, name) for name in TIMEOUTS}
    try:
        for name in TIMEOUTS:
            setattr(c10d, name, timedelta(seconds=seconds))
        yield
    finally:
        for name, value in before.items():
            setattr(c10d, name, value)


# --- groups of ranks that share the experts of a layer --------------------------------------------


def make_expert_groups(size: int, pipeline_stages: int) -> None:
    """Groups of `size` ranks, which have the name ep_size_{size}; once in a process."""
    if f"ep_size_{size}" not in groups._get_expert_parallel_group_dict():
        groups._create_expert_and_data_parallel(size, pp_size=pipeline_stages)


def expert_group(name: str) -> tuple[Any, int]:
    """The group of ranks that hold all experts together, and this rank's place in it."""
    return groups._get_expert_parallel_group(name), groups._get_expert_parallel_rank(name)


def expert_replicas(name: str) -> Any:
    """The group of ranks that hold the same experts as this one."""
    return groups._get_expert_data_parallel_group(name)


# --- DeepSpeed's pipeline engine ------------------------------------------------------------------


def replace_instruction(engine: Any, instruction: type, act: Callable[[Any, int], None]) -> None:
    """From now on `act(engine, buffer_id)` is what the engine does for an instruction. The engine
    computes the loss in evaluation too.
    """
    engine._INSTRUCTION_MAP = {**engine._INSTRUCTION_MAP, instruction: act}
    engine._compute_loss = True


def run_schedule(engine: Any, schedule: Any) -> None:
    engine._exec_schedule(schedule)


def reduce_gradients(engine: Any) -> None:
    """Of tied weights over stages, then of all over data ranks."""
    engine._exec_reduce_tied_grads()
    engine._exec_reduce_grads()


def optimizer_step(engine: Any) -> None:
    engine._exec_optimizer_step()


@contextlib.contextmanager
def engine_backward(engine: Any) -> Iterator[None]:
    """Around a backward of torch's own: the engine's hooks take its gradients as their own."""
    engine._running_engine_backward = True
    yield
    engine._running_engine_backward = False
