"""Cost of a trunk forward on n tokens and of K drafts, against one token; where K drafts pay."""

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any


def measure(variants: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    import torch
    from timing import interleave

    return interleave(variants, rounds, torch.device("cpu"))


def steps_report(model: Any, prompt: list[int], options: argparse.Namespace, rows: int) -> str:
    """Of a batch of `rows`: the cost of a trunk forward on n tokens and of K drafts, against one
    token; the tokens per step, and the acceptance, from which on K drafts pay.
    """
    import torch

    from dsv3_mtp.decode.cache import CacheSlots
    from dsv3_mtp.decode.decoder import Decoder
    from dsv3_mtp.decode.draft import draft_limit
    from dsv3_mtp.decode.sample import DraftSampler, TokenSampler

    most = max(options.depths, default=1)
    slots = CacheSlots(model, len(prompt) + 2 * most + 2)
    with torch.inference_mode():
        decoder = Decoder(model)
    caches, starts = slots.caches(model.config.num_hidden_layers, rows), [len(prompt)] * rows
    tokens = torch.tensor([(prompt * (most + 1))[: most + 1]] * rows)

    @torch.inference_mode()
    def forward(count: int) -> None:
        for _ in range(20):
            window = decoder.window(slots, starts, count)
            states = decoder.trunk(tokens[:, :count], caches, window)
            decoder.logits(states.post_norm).argmax(-1).tolist()

    steps: dict[str, Callable[[], Any]] = {str(n): partial(forward, n) for n in range(1, most + 2)}
    depths = [k for k in range(1, 1 + most) if draft_limit(model, k) == k]
    if depths:
        kind = model.mtp.drafter(model.mtp_config)
        drafter = kind(decoder, slots, rows=rows, depth=depths[-1], chunk=len(prompt) + 2)
        ids = torch.zeros(rows, slots.slots + most, dtype=torch.long)

        @torch.inference_mode()
        def draft(count: int) -> None:
            for _ in range(20):
                drafter.filled = [[m - 1 for m in starts] for _ in drafter.filled]  # one is new
                drafter.draft(ids, starts, count, DraftSampler(TokenSampler()))[0].tolist()

        steps |= {f"draft {k}": partial(draft, k) for k in depths}
    seconds = measure(steps, 4 * options.rounds)
    cost = {
        n: statistics.median(a / b for a, b in zip(t, seconds["1"], strict=True))
        for n, t in seconds.items()
    }
    one = statistics.median(seconds["1"]) / 20
    verify = ", ".join(f"T{n}/T1 {cost[str(n)]:.2f}" for n in range(2, most + 2))
    lines = [f"batch {rows}: one trunk step {one * 1e6:.0f} us; {verify}"]
    for k in depths:
        drafts = cost[f"draft {k}"]
        needed = cost[str(k + 1)] + drafts
        pays = f"break-even K={k}: {needed:.2f} tokens per step{_equal_acceptance(needed, k)}"
        lines.append(f"{pays}; the drafts cost {drafts:.2f} T1")
    return "\n".join(lines)


def _equal_acceptance(needed: float, drafts: int) -> str:
    """The p with 1 + p + .. + p^K = needed, as text."""
    from scipy.optimize import brentq

    if needed > 1 + drafts:
        return ", out of reach"
    needed = max(needed, 1.0)  # below 1 by noise only
    p = brentq(lambda p: sum(p**k for k in range(drafts + 1)) - needed, 0.0, 1.0)
    return f", acceptance {p:.2f} at every position"
