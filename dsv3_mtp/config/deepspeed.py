"""What a run's `deepspeed:` block may hold. DeepSpeed takes misspelt top-level keys in silence."""

from typing import Any

from dsv3_mtp.config.reader import KeyProblems, Problem, did_you_mean, show

# Top-level keys that DeepSpeed 0.19.8 reads and that a run may set, and what they hold: DeepSpeed
# itself takes any text for true.
ALLOWED: dict[str, tuple[type, str]] = {
    "comms_logger": (dict, "a mapping"),
    "communication_data_type": (str, "text"),
    "data_types": (dict, "a mapping"),
    "disable_python_gc": (bool, "true or false"),
    "dump_state": (bool, "true or false"),
    "log_level": (str, "text, such as info"),
    "memory_breakdown": (bool, "true or false"),
    "timers": (dict, "a mapping"),
    "zero_optimization": (dict, "a mapping"),
}

_SCALE = (
    "is fixed: losses are divided by the token counts of the whole step, so gradients are summed"
)
_LAYOUT = "is not supported: the ranks of a run are laid out by the parallel section"
_UNUSED = "would have no effect: tokens come from the data section's own sampler"
_STATES = "is not supported: checkpoints read weights and optimizer states from DeepSpeed's memory"
_NOT_READ = "would have no effect on this training loop"
_NO_TENSORS = "is not supported: it fails on outputs that are no tensors"
_OWN_FORMAT = "would have no effect: checkpoints are not DeepSpeed's"

# Keys that belong to another section, or that would break or be lost on the training loop.
OWNED = {
    "train_batch_size": "set train.batch_size instead",
    "train_micro_batch_size_per_gpu": "set train.micro_batch_size instead",
    "gradient_accumulation_steps": "set train.batch_size and train.micro_batch_size instead",
    "gradient_clipping": "set optim.grad_clip instead",
    "optimizer": "set optim instead",
    "scheduler": "set optim.schedule instead",
    "bf16": "set train.dtype instead",
    "bfloat16": "set train.dtype instead",
    "fp16": "set train.dtype instead",
    "torch_autocast": "set train.dtype instead",
    "tensorboard": "set log.tensorboard instead",
    "wandb": "set log.wandb instead",
    "steps_per_print": "set log.every instead",
    "gradient_allreduce_op": _SCALE,
    "prescale_gradients": _SCALE,
    "gradient_predivide_factor": _SCALE,
    "managed_gradient_accumulation": "is fixed: the training loop decides when a step ends",
    "checkpoint": "would have no effect: checkpoints are not DeepSpeed's; set checkpoint instead",
    "data_efficiency": _UNUSED,
    "dataloader_drop_last": _UNUSED,
    "vocabulary_size": "set model.vocab_size instead",
    "pipeline": _LAYOUT,
    "tensor_parallel": _LAYOUT,
    "expert_parallel": _LAYOUT,
    "use_data_before_expert_parallelism": _LAYOUT,
    "sequence_parallel_size": _LAYOUT,
    "data_parallel_size": _LAYOUT,
    "seq_parallel_communication_data_type": _LAYOUT,
    "activation_checkpointing": _NOT_READ,
    "aio": _NOT_READ,
    "compile": _NOT_READ,
    "datastates_ckpt": _NOT_READ,
    "disable_allgather": _NOT_READ,
    "zero_allow_untested_optimizer": _NOT_READ,
    "zero_force_ds_cpu_optimizer": _NOT_READ,
    "flops_profiler": "is not supported: --dry-run prints the FLOPs per token",
    "wall_clock_breakdown": "is not supported: perf/tokens_per_s is logged",
    "csv_monitor": "is not supported: metrics.jsonl holds every number",
    "comet": "is not supported: set log.tensorboard or log.wandb",
    "autotuning": (
        "is not supported: its launcher rewrites the batch size, which train.batch_size owns"
    ),
    "hybrid_engine": "is not supported: this is not an RLHF loop",
    "weight_quantization": "is not supported: it is for DeepSpeed inference",
}

# The same within zero_optimization.
ZERO_OWNED = {
    "stage": "set parallel.zero_stage instead",
    "offload_optimizer": "set parallel.offload_optimizer instead",
    "cpu_offload": "set parallel.offload_optimizer instead",
    "zenflow": _STATES,
    "compute_grad_norm": "is not supported: optim/grad_norm is logged, and has to be finite",
    "stage3_module_granularity_threshold": _NO_TENSORS,
    "module_granularity_threshold": _NO_TENSORS,
    "elastic_checkpoint": _OWN_FORMAT,
    "load_from_fp32_weights": _OWN_FORMAT,
    "pipeline_loading_checkpoint": _OWN_FORMAT,
    "stage3_gather_16bit_weights_on_model_save": _OWN_FORMAT,
    "stage3_gather_fp16_weights_on_model_save": _OWN_FORMAT,
}


def check_deepspeed(block: dict[str, Any]) -> dict[str, Any]:
    """Returns the block; raises KeyProblems: every key that cannot be set there, and its remedy."""
    problems: list[Problem] = []
    for key in block:
        if key in OWNED:
            problems.append((key, OWNED[key]))
        elif key not in ALLOWED:
            known = [f"deepspeed.{name}" for name in sorted({*ALLOWED, *OWNED})]
            hint = did_you_mean(f"deepspeed.{key}", known)
            problems.append((key, f"unknown to DeepSpeed 0.19.8{hint}"))
        elif not isinstance(block[key], ALLOWED[key][0]):
            problems.append((key, f"must be {ALLOWED[key][1]} (got {show(block[key])})"))
    types = block.get("data_types", {})
    if isinstance(types, dict) and types.keys() - {"grad_accum_dtype"}:
        text = "only grad_accum_dtype can be set; train.dtype owns the others"
        problems.append(("data_types", text))
    zero = block.get("zero_optimization", {})
    if isinstance(zero, dict):
        owned = [(key, remedy) for key, remedy in ZERO_OWNED.items() if key in zero]
        problems += [(f"zero_optimization.{key}", remedy) for key, remedy in owned]
        if "nvme" in str(zero.get("offload_param")):
            problems.append(("zero_optimization.offload_param", _STATES))
    if problems:
        raise KeyProblems(problems)
    return block
