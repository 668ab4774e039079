"""Cost of a trunk forward on n tokens and of one draft, against one token; where K drafts pay."""

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any


def measure(variants: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    import torch
    from timing import interleave

    return interleave(variants, rounds, torch.device("cpu"))


def steps_report(model: Any, prompt: list[int], options: argparse.Namespace) -> str:
    """Cost of a trunk forward on n tokens and of one draft, against one token; the acceptance where
    K drafts pay.
    """
    import torch

    from dsv3_mtp.decode.cache import CacheSlots
    from dsv3_mtp.decode.decoder import Decoder
    from dsv3_mtp.decode.draft import no_drafter
    from dsv3_mtp.decode.sample import DraftSampler, TokenSampler

    most = max(options.depths, default=1)
    slots = CacheSlots(model, len(prompt) + most + 2)
    with torch.inference_mode():
        decoder = Decoder(model)
    caches, start = slots.caches(model.config.num_hidden_layers, 1), len(prompt)
    tokens = torch.tensor([(prompt * (most + 1))[: most + 1]])

    @torch.inference_mode()
    def forward(count: int) -> None:
        for _ in range(20):
            states = decoder.trunk(tokens[:, :count], caches, slots.window([start], count))
            decoder.logits(states.post_norm).argmax(-1).tolist()

    steps: dict[str, Callable[[], Any]] = {str(n): partial(forward, n) for n in range(1, most + 2)}
    if no_drafter(model.mtp_config) is None:
        kind = model.mtp.drafter(model.mtp_config)
        drafter = kind(decoder, slots, rows=1, depth=1, chunk=start + 2)
        ids = torch.zeros(1, slots.slots, dtype=torch.long)

        @torch.inference_mode()
        def draft() -> None:
            for _ in range(20):
                drafter.filled = [[start - 1] for _ in drafter.filled]  # one slot is new
                drafter.draft(ids, [start], 1, DraftSampler(TokenSampler()))[0].tolist()

        steps["draft"] = draft
    seconds = measure(steps, 4 * options.rounds)
    cost = {
        n: statistics.median(a / b for a, b in zip(t, seconds["1"], strict=True))
        for n, t in seconds.items()
    }
    one = statistics.median(seconds["1"]) / 20
    lines = [
        f"one trunk step {one * 1e6:.0f} us; "
        + ", ".join(f"T{n}/T1 {cost[str(n)]:.2f}" for n in range(2, most + 2))
    ]
    if "draft" in cost:
        lines[0] += f"; one draft Td/T1 {cost['draft']:.2f}"
        for k in range(1, most + 1):
            needed = cost[str(k + 1)] + k * cost["draft"]
            lines.append(
                f"break-even K={k}: {needed:.2f} tokens per step{_equal_acceptance(needed, k)}"
            )
    return "\n".join(lines)


def _equal_acceptance(needed: float, drafts: int) -> str:
    """The p with 1 + p + .. + p^K = needed, as text."""
    from scipy.optimize import brentq

    if needed > 1 + drafts:
        return ", out of reach"
    needed = max(needed, 1.0)  # below 1 by noise only
    p = brentq(lambda p: sum(p**k for k in range(drafts + 1)) - needed, 0.0, 1.0)
    return f", acceptance {p:.2f} at every position"
