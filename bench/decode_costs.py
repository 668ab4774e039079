"""Cost of a step with K drafts against a plain one: from how many tokens per step on it pays."""

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from itertools import islice
from typing import Any


def measure(variants: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    import torch
    from timing import interleave

    return interleave(variants, rounds, torch.device("cpu"))


def steps_report(model: Any, prompt: list[int], options: argparse.Namespace, rows: int) -> str:
    """Of a batch of `rows`: what a step with K drafts costs against a plain one. As many tokens per
    step make it as fast as plain decoding; which acceptance that is.
    """
    import torch
    from timing import interleave, quartiles

    from dsv3_mtp.decode.draft import draft_limit

    depths = [k for k in options.depths if model.depths and draft_limit(model, k) == k]
    steps = (options.new_tokens - 1) // (max(depths, default=0) + 1)
    if steps < 2:
        return f"batch {rows}: {options.new_tokens} new tokens are too few steps to time"
    variants = {k: partial(step_seconds, model, [prompt] * rows, k, steps) for k in (0, *depths)}
    seconds = interleave(
        {str(k): own for k, own in variants.items()},
        options.rounds,
        torch.device("cpu"),
        timer=lambda own, device: own(),
    )
    lines = [f"batch {rows}: a plain step takes {statistics.median(seconds['0']) * 1e6:.0f} us"]
    for k in depths:
        pairs = zip(seconds[str(k)], seconds["0"], strict=True)
        low, needed, high = quartiles([own / plain for own, plain in pairs])
        pays = f"break-even K={k}: {needed:.2f} [{low:.2f}, {high:.2f}] tokens per step"
        lines.append(pays + _equal_acceptance(needed, k))
    return "\n".join(lines)


def step_seconds(model: Any, prompts: list[list[int]], drafts: int, steps: int) -> float:
    """CPU seconds of a step, without the prompts; wall seconds where several threads compute."""
    import torch
    from timing import now

    from dsv3_mtp.decode.generate import Settings, stream

    # no row ends before the last step that is timed
    settings = Settings(max_new_tokens=1 + steps * (drafts + 1), draft_depth=drafts)
    found, device = stream(model, prompts, settings), torch.device("cpu")
    list(islice(found, 2 * len(prompts)))  # of the prompts, and one step
    start = now(device)
    list(islice(found, (steps - 1) * len(prompts)))
    return (now(device) - start) / (steps - 1)


def _equal_acceptance(needed: float, drafts: int) -> str:
    """The p with 1 + p + .. + p^K = needed, as text."""
    from scipy.optimize import brentq

    if needed > 1 + drafts:
        return ", out of reach"
    needed = max(needed, 1.0)  # below 1 by noise only
    p = brentq(lambda p: sum(p**k for k in range(drafts + 1)) - needed, 0.0, 1.0)
    return f", acceptance {p:.2f} at every position"
