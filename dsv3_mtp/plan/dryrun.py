"""What a run would be, without running it: sizes, cost, memory, traffic; the config on request."""

import json
from pathlib import Path
from typing import Any

from dsv3_mtp.config import Config, schedules
from dsv3_mtp.config.layout import rank_problems
from dsv3_mtp.hf.frozen import stays_fp8
from dsv3_mtp.model.causal_lm import meta_model
from dsv3_mtp.model.size import ModelSize, model_size
from dsv3_mtp.ops.compute import Compute, building
from dsv3_mtp.parallel.engine import deepspeed_config
from dsv3_mtp.plan.memory import Layout, StagePlan, bubbles, communication, layout, plan
from dsv3_mtp.precision.stored import stored
from dsv3_mtp.report.metrics import peak_flops
from dsv3_mtp.report.progress import duration
from dsv3_mtp.runs.folder import run_folder

GPU, MFU = "H100", 0.4  # in which GPU-hours are stated
# GiB on the accelerators that are sold
DEVICES = (8, 12, 16, 24, 32, 40, 48, 80, 96, 141, 192, 288)
# Columns of the memory table: fields of a StagePlan, and their names there.
SIZES = {"weights": "weights", "gradients": "gradients", "states": "optimizer"}
SIZES |= {"activations": "activations", "buffers": "buffers", "update": "update", "total": "peak"}


def dry_run(config: Config, *, world_size: int, plot: bool, settings: bool = False) -> str:
    """The report that `dsv3 plan` prints. plot: draw schedules.png into the run folder. settings:
    the whole config and DeepSpeed's JSON as well.

    Raises:
        ValueError: `world_size` ranks cannot be laid out as the config says.
    """
    folder = run_folder(config)
    if refused := rank_problems(config, world_size):
        raise ValueError("\n".join([*refused, *near_sizes(config, world_size)]))
    fp8, held = _trunk(config)
    with building(stored(Compute()) if fp8 else Compute()):
        model = meta_model(config.model, config.mtp, freeze=config.train.freeze)
    size, shape = model_size(model, config.data.seq_len), layout(config, world_size)
    stages = plan(config, model, shape)
    costs = cost_rows(config, size, shape) | time_rows(config, size, world_size)
    sent = communication(config, stages, shape)
    parts = [
        "# size and cost\n" + _rows(size_rows(config, size) | costs | task_rows(config)),
        f"# memory of one rank, {_describe(config, shape, world_size)}\n"
        + "\n".join([memory_table(config, stages), *held]),
        "# sent by one rank in one step, busiest stage\n"
        + _rows({name: _bytes(amount) for name, amount in sent.items()}),
    ]
    if shape.stages > 1:
        idle = bubbles(shape, recompute=config.train.activation_checkpointing == "full")
        rows = _rows({name: f"{share:.1%}" for name, share in idle.items()})
        parts.append("# pipeline bubble, share of a step\n" + rows)
    if settings:
        ds_config = deepspeed_config(config, world_size)
        parts.append("# config\n" + config.to_yaml().rstrip())
        parts.append("# DeepSpeed JSON\n" + json.dumps(ds_config, indent=2))
    if plot:
        folder.mkdir(parents=True, exist_ok=True)
        from dsv3_mtp.report.plots import plot_schedules  # matplotlib, a second

        plot_schedules(config, folder / "schedules.png")
        parts.append(f"schedules: {folder / 'schedules.png'}")
    return "\n\n".join(parts)


def _trunk(config: Config) -> tuple[bool, list[str]]:
    """`stays_fp8`; where the weights are not on this machine, a line that says what is taken."""
    source = config.train.init_from
    if config.train.freeze == "trunk" and source is not None and not Path(source).is_dir():
        text = f"{source} is not there: its trunk is counted in {config.train.dtype}"
        return False, [f"train.init_from: {text}"]
    return stays_fp8(config)


def near_sizes(config: Config, world_size: int) -> list[str]:
    """A line that names the nearest numbers of ranks, below and above, that the config fits."""
    ranges = range(world_size - 1, 0, -1), range(world_size + 1, 8 * max(world_size, 256))
    usable = [next((n for n in near if not rank_problems(config, n)), None) for near in ranges]
    found = " and ".join(f"{n:,}" for n in usable if n is not None)
    return [f"--world-size: the nearest that fit are {found}"] if found else []


def size_rows(config: Config, size: ModelSize) -> dict[str, Any]:
    return {
        "parameters, main model": f"{size.total:,}",
        "  active per token": (
            f"{size.active:,} ({size.active - size.embedding:,} without the embedding)"
        ),
        (
            f"parameters, MTP ({config.mtp.mode}, D={config.mtp.depths})"
        ): f"{size.mtp_total:,} (embedding, head shared)",
        "  active per token ": f"{size.mtp_active:,}",
        "training FLOPs per token": (
            f"{size.flops_per_token / 1e9:,.3f} GFLOP (6N + causal attention, all depths)"
        ),
    }


def memory_table(config: Config, stages: list[StagePlan]) -> str:
    """One line for each pipeline stage, then what the largest fits into."""
    head = ["stage", "parts", "parameters", *SIZES.values()]
    lines = [head]
    for number, stage in enumerate(stages):
        flight = f" ({stage.in_flight} in flight)" if len(stages) > 1 else ""
        cells = [_bytes(getattr(stage, size)) for size in SIZES]
        cells[3] += flight
        lines.append([str(number), _span(stage.names), f"{stage.dense + stage.experts:,}", *cells])
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    text = [
        "  ".join(f"{cell:>{width}}" for cell, width in zip(line, widths, strict=True))
        for line in lines
    ]
    largest = max(stage.total for stage in stages)
    fitting = next(
        (f"{size} GiB" for size in DEVICES if largest <= 0.9 * size * 2**30), "no device"
    )
    text.append(
        "peak: weights, optimizer, and the larger of update (gradients with their copies) and "
        "gradients + activations + buffers"
    )
    text.append(
        f"largest: {_bytes(largest)}, fits in {fitting} with 10 % left for allocator and driver"
    )
    if host := max(stage.host for stage in stages):
        kinds = {
            "optimizer states": config.parallel.offload_optimizer,
            "average": config.train.ema_decay is not None,
        }
        named = " and ".join(name for name, there in kinds.items() if there)
        text.append(f"in host memory, per rank: {_bytes(host)} of {named}")
    return "\n".join(text)


def _describe(config: Config, shape: Layout, world_size: int) -> str:
    parallel = config.parallel
    pieces = [f"{world_size} rank{'s' * (world_size > 1)}"]
    if shape.stages > 1:
        pieces.append(f"{shape.stages} pipeline stages x {shape.data}")
    if shape.experts > 1:
        pieces.append(f"experts over {shape.experts} ranks, {shape.copies} copies")
    if shape.slices > 1:
        pieces.append(f"rows over {shape.slices} ranks")
    pieces.append(f"ZeRO-{parallel.zero_stage}" + " with offload" * parallel.offload_optimizer)
    pieces.append(f"activation checkpointing {config.train.activation_checkpointing}")
    pieces.append(
        f"{shape.micro_batches} micro-batch{'es' * (shape.micro_batches > 1)} "
        f"of {shape.tokens} tokens"
    )
    return "; ".join(pieces)


def _span(names: list[str]) -> str:
    """["embedding", "0", "1", "2"] -> "embedding, 0-2"."""
    layers = [name for name in names if name.isdigit()]
    middle = [f"{layers[0]}-{layers[-1]}" if len(layers) > 1 else layers[0]] if layers else []
    before = [name for name in names if name == "embedding"]
    after = [name for name in names if name.endswith("head")]
    return ", ".join([*before, *middle, *after])


def cost_rows(config: Config, size: ModelSize, shape: Layout) -> dict[str, Any]:
    train = config.train
    steps = schedules.total_steps(
        train, config.data.seq_len, train.micro_batch_size * shape.data // shape.slices
    )
    return {
        "optimizer steps": f"{steps:,}",
        "tokens": f"{train.total_tokens:,}",
        "tokens per step (full batch)": f"{train.batch_size * config.data.seq_len:,}",
        "training FLOPs": f"{size.flops_per_token * train.total_tokens:.3e}",
    }


def time_rows(config: Config, size: ModelSize, world_size: int) -> dict[str, Any]:
    """GPU-hours at a stated utilisation: a rule of thumb, no measurement of this program."""
    peak = peak_flops(GPU) or 0.0
    hours = size.flops_per_token * config.train.total_tokens / (MFU * peak) / 3600
    text = f"{hours:,.3g}" if hours < 1000 else f"{hours:,.0f}"
    wall = f"{duration(hours * 3600 / world_size)} on {world_size:,}"
    return {
        f"{GPU} hours": f"{text} ({wall}), if {MFU:.0%} of {peak / 1e12:.0f} TFLOP/s are reached"
    }


def task_rows(config: Config) -> dict[str, Any]:
    """What is known about data.task beforehand; nothing for text."""
    task = config.data.task
    return {} if task is None else task.facts(config.data.seq_len, config.mtp)


def _rows(rows: dict[str, Any]) -> str:
    width = max(map(len, rows))
    return "\n".join(f"{name:{width}}  {value}" for name, value in rows.items())


def _bytes(value: float) -> str:
    return f"{value / 2**30:,.2f} GiB" if value >= 2**30 else f"{value / 2**20:,.1f} MiB"
