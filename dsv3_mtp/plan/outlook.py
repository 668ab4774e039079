"""How long a run will take, before its first step; and the command that starts it."""

import time
from pathlib import Path

import torch

from dsv3_mtp.config import load_config, schedules
from dsv3_mtp.model.causal_lm import meta_model
from dsv3_mtp.model.size import model_size
from dsv3_mtp.report.metrics import peak_flops
from dsv3_mtp.report.progress import duration, quantity

SHARE = 0.3  # of what products alone reach, that training reaches: a guess, said as one
SIDE, SECONDS = 512, 0.2  # of the products that a CPU is timed with


def outlook(run: str | Path) -> list[str]:
    """Steps and time of a run as its config says, on one device of this machine, and the next
    command. The rate is stated: it is no measurement of this model.
    """
    config = load_config(Path(run) / "config.yaml")
    model = meta_model(config.model, config.mtp, freeze=config.train.freeze)
    flops = model_size(model, config.data.seq_len).flops_per_token
    rate, source = _rate()
    total = config.train.total_tokens
    time_left = duration(total * flops / rate)
    steps = schedules.total_steps(config.train, config.data.seq_len, config.train.micro_batch_size)
    return [
        f"train.total_tokens {quantity(total)}: {steps:,} steps of "
        f"{config.train.batch_size * config.data.seq_len:,} tokens, about {time_left} on one "
        f"device at {quantity(rate / flops)} tokens/s ({SHARE:.0%} of {source}; the first lines of "
        "the run show the true rate)",
        f"next: dsv3 train --config {Path(run) / 'config.yaml'}",
    ]


def _rate() -> tuple[float, str]:
    """FLOPs per second that are counted on, and of what they are a share."""
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        if peak := peak_flops(name):
            return SHARE * peak, f"the peak of {name}"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    left = torch.randn(SIDE, SIDE, device=device)
    left @ left
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < SECONDS:
        (left @ left).sum().item()
        count += 1
    measured = count * 2 * SIDE**3 / (time.perf_counter() - start)
    return SHARE * measured, f"the {measured / 1e9:,.0f} GFLOP/s of float32 products here"
