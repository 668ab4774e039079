"""What a run would be, without running it: resolved config, sizes, memory, cost, DeepSpeed JSON."""

import json
from typing import Any

import torch

from dsv3_mtp import schedules
from dsv3_mtp.config import Config
from dsv3_mtp.config.layout import data_size
from dsv3_mtp.model.causal_lm import DeepseekV3MTP, ModelSize, model_size
from dsv3_mtp.parallel.engine import deepspeed_config
from dsv3_mtp.plots import plot_schedules
from dsv3_mtp.runs import run_folder


def dry_run(config: Config, *, world_size: int, plot: bool) -> str:
    """The report that `tools/train.py --dry-run` prints. With `plot`, draws schedules.png into the run folder.

    Raises:
        ValueError: the batch does not divide over `world_size` ranks.
    """
    folder = run_folder(config)
    ds_config = deepspeed_config(config, world_size, str(folder))
    with torch.device("meta"):
        size = model_size(DeepseekV3MTP(config.model, config.mtp), config.data.seq_len)
    rows = {
        **size_rows(config, size),
        **memory_rows(config, size, world_size),
        **cost_rows(config, size, world_size),
    }
    width = max(map(len, rows))
    parts = [
        "# resolved config\n" + config.to_yaml().rstrip(),
        f"# size and cost, {world_size} rank{'s' * (world_size > 1)}\n"
        + "\n".join(f"{name:{width}}  {value}" for name, value in rows.items()),
        "# DeepSpeed JSON\n" + json.dumps(ds_config, indent=2),
    ]
    if plot:
        folder.mkdir(parents=True, exist_ok=True)
        plot_schedules(config, folder / "schedules.png")
        parts.append(f"schedules: {folder / 'schedules.png'}")
    return "\n\n".join(parts)


def size_rows(config: Config, size: ModelSize) -> dict[str, Any]:
    return {
        "parameters, main model": f"{size.total:,}",
        "  active per token": f"{size.active:,} ({size.active - size.embedding:,} without the embedding)",
        f"parameters, MTP ({config.mtp.mode}, D={config.mtp.depths})": f"{size.mtp_total:,} (embedding, head shared)",
        "  active per token ": f"{size.mtp_active:,}",
        "training FLOPs per token": f"{size.flops_per_token / 1e9:,.3f} GFLOP (6N + causal attention, all depths)",
    }


def memory_rows(config: Config, size: ModelSize, world_size: int) -> dict[str, Any]:
    """Bytes of one rank's weights, gradients and optimizer states, without activations."""
    count = size.total + size.mtp_total
    half, zero1 = config.train.dtype == "bfloat16", config.parallel.zero_stage == 1
    element = 2 if half else 4
    # DeepSpeed's optimizers keep a float32 master copy next to the two Adam moments; plain float32 ZeRO-0 does not.
    states = (12 if half or zero1 else 8) * count / (world_size if zero1 else 1)
    parts = {"weights": element * count, "gradients": element * count, "optimizer states": states}
    rows = {f"memory per rank: {name}": _bytes(value) for name, value in parts.items()}
    return rows | {"memory per rank: sum, without activations": _bytes(sum(parts.values()))}


def cost_rows(config: Config, size: ModelSize, world_size: int) -> dict[str, Any]:
    train = config.train
    steps = schedules.total_steps(train, config.data.seq_len, train.micro_batch_size * data_size(config, world_size))
    return {
        "optimizer steps": f"{steps:,}",
        "tokens": f"{train.total_tokens:,}",
        "tokens per step (full batch)": f"{train.batch_size * config.data.seq_len:,}",
        "training FLOPs": f"{size.flops_per_token * train.total_tokens:.3e}",
    }


def _bytes(value: float) -> str:
    return f"{value / 2**30:,.2f} GiB" if value >= 2**30 else f"{value / 2**20:,.1f} MiB"
