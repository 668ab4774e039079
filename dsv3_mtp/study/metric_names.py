"""The metrics that a study can ask for: what each is called, which way is better, and what it
needs; k is a number.
"""

import re

from dsv3_mtp.config import TASKS

# In words, {} being k; which way is better, None: neither.
METRICS: dict[str, tuple[str, str | None]] = {
    "val/main_loss": ("main validation loss, nats per token", "lower"),
    "val/bits_per_byte": ("main validation loss, bits per byte", "lower"),
    "val/mtp_loss/k": ("teacher-forced loss of depth {}, nats per token", "lower"),
    "val/top1/k": ("top1 of depth {} (teacher-forced, against the text)", "higher"),
    "val/agreement/k": ("agreement of depths 1..{} (teacher-forced, with the main head)", "higher"),
    "train/max_violation": ("MaxVio of the trunk's routers, last quarter of training", "lower"),
    "train/mtp_max_violation/1": (
        "MaxVio of the first MTP router, last quarter of training",
        "lower",
    ),
    "acceptance/T0/tokens_per_step": ("tokens per step, greedy, free-running", "higher"),
    "acceptance/T0/distinct": ("share of distinct tokens in the greedy text", None),
    "acceptance/T0/joint/k": ("acceptance of drafts 1..{}, greedy, free-running", "higher"),
    "acceptance/T1/tokens_per_step": ("tokens per step at temperature 1, free-running", "higher"),
    "acceptance/T1/distinct": ("acceptance/T1/distinct", None),
    "acceptance/T1/joint/k": (
        "acceptance of drafts 1..{} at temperature 1, free-running",
        "higher",
    ),
    "train/main_loss_error": (
        "relative error of the main training loss (EMA 0.9), mean of the last quarter, %",
        None,
    ),
    "train/main_loss_error_max": (
        "relative error of the main training loss (EMA 0.9), largest size, %",
        "lower",
    ),
    "train/mtp_loss_error/k": (
        "relative error of the training loss of depth {} (EMA 0.9), last quarter, %",
        None,
    ),
    "train/mtp_loss_error_max/k": (
        "relative error of the training loss of depth {} (EMA 0.9), largest size, %",
        "lower",
    ),
    "task/solved": ("share of seeds that solved the task", "higher"),
}
for _task in TASKS.values():
    METRICS |= _task.METRICS
# How names begin that are measured only with a key of the study file, and that key.
NEEDS = {
    "acceptance/": "acceptance",
    "train/main_loss_error": "loss_error_against",
    "train/mtp_loss_error": "loss_error_against",
    "task/solved": "solve_threshold",
}


def family(name: str) -> str:
    """The key of METRICS that a metric would have: val/top1/k for val/top1/2."""
    return name if name in METRICS else re.sub(r"/\d+$", "/k", name)


def describe_metric(name: str) -> tuple[str, str | None]:
    """(words, "lower" | "higher" is better | None)."""
    words, better = METRICS.get(family(name), (name, None))
    return words.format(name.rpartition("/")[2]), better
