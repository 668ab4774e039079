"""The DeepSpeed engine: its JSON from the config, one optimizer step, reductions."""

import contextlib
import math
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from torch import Tensor

from dsv3_mtp.config import Config
from dsv3_mtp.config.layout import data_size, rank_problems
from dsv3_mtp.model.causal_lm import DeepseekV3MTP
from dsv3_mtp.model.output import Batch, LossSettings, MTPOutput
from dsv3_mtp.ops.ranges import named
from dsv3_mtp.parallel import environment, private
from dsv3_mtp.parallel.clip import clip_apart, scale_gradients, side_norms
from dsv3_mtp.parallel.launch import World
from dsv3_mtp.precision.stored import SCALE


def deepspeed_config(config: Config, world_size: int) -> dict[str, Any]:
    """The complete DeepSpeed JSON. The config's `deepspeed:` section is merged over it; keys we own
    were refused there.

    Raises:
        ValueError: this many ranks cannot be laid out as the config says.
    """
    train = config.train
    if refused := rank_problems(config, world_size):
        raise ValueError("\n".join(refused))
    rows = train.micro_batch_size * data_size(config, world_size)
    generated: dict[str, Any] = {
        "train_batch_size": train.batch_size
        * config.parallel.sequence_parallel_size,  # it knows data parallelism only
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        "gradient_accumulation_steps": train.batch_size // rows,
        "gradient_clipping": 0.0 if config.clips_apart else config.optim.grad_clip,
        "steps_per_print": None,
        # it waits for the GPU twice in every micro-batch
        "timers": {"throughput": {"enabled": False}},
        "zero_optimization": _zero(config),
        "bf16": {
            "enabled": train.dtype == "bfloat16",
            # A gradient is added to the float32 sum when it is ready, and then freed. A pipeline
            # needs it longer: the tied embedding's is sent between stages.
            "immediate_grad_update": config.parallel.pipeline_stages == 1,
        },
        "data_types": {"keep_in_fp32_modules": ["e_score_correction_bias", SCALE]},
        "zero_allow_untested_optimizer": config.optim.moments
        == "bfloat16",  # which it does not know (optim.py)
        # torch's fused AdamW runs on the host too, with nothing to build
        "zero_force_ds_cpu_optimizer": False,
    }
    if sums_in_float32(config):
        generated["data_types"]["grad_accum_dtype"] = "fp32"
        generated["communication_data_type"] = "fp32"
    return _merge(generated, config.deepspeed)


def sums_in_float32(config: Config) -> bool:
    """Whether the gradients of a bfloat16 run are summed over micro-batches and ranks in float32,
    as V3 does (section 3.3.3): ZeRO 1 to 3, unless `deepspeed.data_types.grad_accum_dtype` says
    bf16. DeepSpeed's ZeRO-0 refuses it.
    """
    asked = config.deepspeed.get("data_types", {}).get("grad_accum_dtype")
    wide = config.train.dtype == "bfloat16" and config.parallel.zero_stage > 0
    return wide and asked in (None, "fp32")


def _zero(config: Config) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": config.parallel.zero_stage}
    if config.parallel.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return zero


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def import_muon() -> None:
    """Imports DeepSpeed's Muon optimizer, as DeepSpeed does on every start, but without compiling.

    The import gives three functions to torch.compile, and that loads inductor for one to two
    seconds.
    """
    with environment({"TORCHDYNAMO_DISABLE": "1"}):
        private.import_muon()


class Engine:
    """What the trainer uses of `deepspeed.initialize`."""

    def __init__(
        self,
        model: DeepseekV3MTP,
        optimizer: torch.optim.Optimizer,
        *,
        ds_config: dict,
        world: World,
        module: torch.nn.Module | None = None,
        apart: float | None = None,
    ):
        """module: what runs, made of the model's parts; None: the model itself. apart: the largest
        gradient norm of trunk and heads each; None: DeepSpeed clips both together.
        """
        private.without_output_warning()
        import_muon()
        # ZeRO-0 in bfloat16 takes a step while it is initialized: with rate 0 that changes nothing.
        # `step` sets the rate of every later step.
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        # DeepSpeed prints lines on memory; its errors go to stderr or are raised.
        with contextlib.redirect_stdout(None):
            self.engine, self.optimizer, _, _ = deepspeed.initialize(
                model=module or model,
                optimizer=optimizer,
                config=ds_config,
                dist_init_required=False,
            )
        if isinstance(self.optimizer, FP16_UnfusedOptimizer):
            self.optimizer.state.clear()  # of that step
        self.world, self.model, self.apart = world, model, apart
        if apart is not None:
            optimizer.register_step_pre_hook(scale_gradients)

    @property
    def module(self) -> torch.nn.Module:
        return self.engine.module

    def own(self, batch: Batch) -> Batch:
        """What this rank computes of a batch of whole rows: all, or its shard of every row."""
        shard, ahead = self.model.shard, self.model.lookahead
        return [tuple(None if x is None else shard.cut(x, ahead) for x in piece) for piece in batch]  # type: ignore[misc]

    def accumulate(self, batch: Batch, settings: LossSettings) -> MTPOutput:
        """Forward and backward of this rank's micro-batches of one optimizer step; the gradients
        are then averaged. Returns the sums of the outputs.
        """
        total = self.model.no_output()
        for number, (tokens, documents, scored) in enumerate(self.own(batch), start=1):
            out = self.forward(tokens, documents, scored, settings)
            self.backward(out.loss, last=number == len(batch))
            total += out.sums()
        return total

    @named("forward")
    def forward(self, *inputs: Any) -> MTPOutput:
        with self._launched():
            return self.engine(*inputs)

    def _launched(self) -> contextlib.AbstractContextManager[None]:
        """ZeRO-3 reads this in every forward, and not every process has a launcher."""
        return environment({"LOCAL_RANK": str(self.world.local_rank)})

    def evaluate(self, batch: Batch, *, blanks: int) -> MTPOutput:
        """The model's `evaluate`: sums for this rank's micro-batches but the last `blanks`."""
        with self._launched():
            return self.model.evaluate(self.own(batch), blanks=blanks)

    @named("backward")
    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Accumulates the gradient; on the `last` micro-batch of the step the ranks' gradients are
        averaged.

        The loss arrives normalized over the whole optimizer step, so DeepSpeed must not divide by
        the accumulation count; and as the batch-size ramp changes that count, the boundary is given
        rather than counted.
        """
        self.engine.set_gradient_accumulation_boundary(last)
        # it has added the last micro-batch's to its float32 gradients
        if isinstance(self.optimizer, BF16_Optimizer):
            self.optimizer.clear_lp_grads()
        self.engine.backward(loss, scale_wrt_gas=False)
        if not last:
            self.engine.step()

    @named("optimizer")
    def step(self, lr: float, *, sides: bool) -> tuple[float, dict[str, float]]:
        """Clips and updates; the gradient norms before clipping: of all, and of trunk and heads
        ("trunk", "mtp") where they are clipped apart or asked for (`sides`).
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.reduce()
        norm = self._replicated_norm() if self.engine.zero_optimization_stage() == 0 else None
        apart: dict[str, float] = {}
        if self.apart is not None:
            apart = clip_apart(self.model, self.engine, self.apart)
        elif sides:
            apart = side_norms(self.model, self.engine)
        self.update()
        if norm is None:
            norm = self.engine.get_global_grad_norm()
        return math.nan if norm is None else float(norm), apart

    def reduce(self) -> None:
        """Averages over the ranks what the last backward has not: nothing, without stages."""

    def update(self) -> None:
        self.engine.step()

    def _replicated_norm(self) -> float:
        """ZeRO-0 in float32 reports no norm, in bfloat16 a rounded one. Every rank has the whole
        gradient.
        """
        grads = [p.grad for p in self.module.parameters() if p.grad is not None]
        return float(
            torch.stack(
                [torch.linalg.vector_norm(grad, dtype=torch.float32) for grad in grads]
            ).norm()
        )

    def all_reduce(self, values: Tensor) -> Tensor:
        """Sum over ranks, in place."""
        if self.world.size > 1:
            dist.all_reduce(values)
        return values
