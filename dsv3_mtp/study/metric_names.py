"""The metrics that a study can ask for: their words, which way is better, what they need."""

import re
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

from dsv3_mtp.config import TASKS
from dsv3_mtp.config.reader import show
from dsv3_mtp.config.task import Task

ALONG = "tokens per step along the text"
MAIN_ERROR = "relative error of the main training loss (EMA 0.9)"
ERROR = "relative error of the training loss of depth {} (EMA 0.9)"
# In words, {} being k.
LOWER = {
    "val/main_loss": "main validation loss, nats per token",
    "val/bits_per_byte": "main validation loss, bits per byte",
    "val/mtp_loss/k": "teacher-forced loss of depth {}, nats per token",
    "shift/main_loss": "main loss on packages held out whole, nats per token",
    "shift/bits_per_byte": "main loss on packages held out whole, bits per byte",
    "shift/mtp_loss/k": "loss of depth {} on packages held out whole, nats per token",
    "train/max_violation": "MaxVio of the trunk's routers, last quarter of training",
    "train/mtp_max_violation/1": "MaxVio of the first MTP router, last quarter of training",
    "train/main_loss_error_max": f"{MAIN_ERROR}, largest size, %",
    "train/mtp_loss_error_max/k": f"{ERROR}, largest size, %",
}
HIGHER = {
    "val/overlap/k": "overlap of depth {} with the main model on real text",
    "val/overlap/tokens_per_step": "tokens per step expected from overlap, on real text",
    "val/overlap_above_table/k": "overlap of depth {} minus the table drafter's on the same trunk",
    "val/top1/k": "top1 of depth {} (teacher-forced, against the text)",
    "val/agreement/k": "agreement of depths 1..{} (teacher-forced, with the main head)",
    "shift/top1/k": "top1 of depth {} on packages held out whole",
    "shift/agreement/k": "agreement of depths 1..{} on packages held out whole",
    "shift/overlap/k": "overlap of depth {} on packages held out whole",
    "shift/overlap/tokens_per_step": f"{ALONG} of packages held out whole, from the overlaps",
    "acceptance/T0/tokens_per_step": "tokens per step, greedy, free-running",
    "acceptance/T0/joint/k": "acceptance of drafts 1..{}, greedy, free-running",
    "acceptance/T1/tokens_per_step": "tokens per step at temperature 1, free-running",
    "acceptance/T1/joint/k": "acceptance of drafts 1..{} at temperature 1, free-running",
    "acceptance/T1/plain_over_drafting": "seconds per token of plain decoding over those with "
    "drafts, at temperature 1 (above 1 drafts pay)",
    "renamed/second_token": "second tokens of names it has not seen, behind an earlier mention",
    "task/solved": "share of seeds that solved the task",
}
NEITHER = {
    "val/floor/unigram": "unigram floor, nats per token",
    "val/floor/bigram": "bigram floor, nats per token",
    "val/floor/trigram": "trigram floor, nats per token",
    "val/floor/unigram_bits_per_byte": "unigram floor, bits per byte",
    "val/floor/bigram_bits_per_byte": "bigram floor, bits per byte",
    "val/floor/trigram_bits_per_byte": "trigram floor, bits per byte",
    "val/floor/overlap/constant/k": "overlap of a constant draft for depth {}",
    "val/floor/overlap/table/k": "overlap of drafts from a table of tokens for depth {}",
    "val/floor/overlap/constant/tokens_per_step": f"{ALONG}, of constant drafts",
    "val/floor/overlap/table/tokens_per_step": f"{ALONG}, of drafts from a table of tokens",
    "renamed/first_mention": "second tokens of names it has not seen, at the first mention",
    "acceptance/T0/distinct": "share of distinct tokens in the greedy text",
    "acceptance/T1/distinct": "acceptance/T1/distinct",
    "train/main_loss_error": f"{MAIN_ERROR}, mean of the last quarter, %",
    "train/mtp_loss_error/k": f"{ERROR}, last quarter, %",
}
METRICS: dict[str, tuple[str, str | None]] = {  # with which way is better
    name: (words, better)
    for better, names in (("lower", LOWER), ("higher", HIGHER), (None, NEITHER))
    for name, words in names.items()
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

RATES = (
    *("task/exact_match", "task/first", "task/second", "task/solved"),
    *(
        "val/top1",
        "val/agreement",
        "val/overlap/",
        "acceptance/T0/joint",
        "acceptance/T1/joint",
        "renamed/",
    ),
)


def is_rate_over_seeds(name: str) -> bool:
    """Its value in one run is 0 or 1: tested by counting seeds, not by their mean."""
    return name == "task/solved"


def bounds(name: str, depths: int) -> tuple[float, float] | None:
    """(floor, ceiling) of a metric with bounds; None: it has none. depths: of the model."""
    if name.endswith("/tokens_per_step"):
        return 1.0, 1.0 + depths
    return (0.0, 1.0) if name.startswith(RATES) else None


# What heads, objectives and tasks of one's own are measured by is known once arms are read.
OWN = re.compile(r"task/\w+(/\d+)?|val/mtp_term/\w+|val/\w+/\d+")


def not_measured(name: str, configs: Iterable[Any] = ()) -> str | None:
    """Why no run of these configs, or of any, has this metric; None: it has."""
    terms = [f"val/{_family(term)}" for config in configs for term in config.mtp.term_names]
    there = list(dict.fromkeys([*METRICS, *Task.EVERY, *terms]))
    if name in there or _family(name) in there:
        return None
    close = get_close_matches(_family(name), there, n=1)
    hint = f"did you mean '{close[0]}'?" if close else f"there are {', '.join(there)}"
    return f"no run is measured by it (got {show(name)}); {hint}"


def _family(name: str) -> str:
    """The key of METRICS that a metric would have: val/top1/k for val/top1/2."""
    return re.sub(r"/\d+$", "/k", name)


def describe_metric(name: str) -> tuple[str, str | None]:
    """(words, "lower" | "higher" is better | None)."""
    metrics = METRICS | Task.EVERY
    words, better = metrics.get(name) or metrics.get(_family(name), (name, None))
    return words.format(name.rpartition("/")[2]), better
