"""Linear probes: what of t_{i+2} .. t_{i+4} can a linear map read from the trunk's state at slot i?

A probe is a multinomial logistic regression on the standardised state that the main head reads
(the trunk after its final norm), fitted on other windows than it is measured on, with an L2 penalty
that is chosen on a quarter of the fitted windows. The problem is convex: the fit does not depend on
a seed. Its floors are the frequencies of the fitted tokens and a table of t_i, from the same slots.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dsv3_mtp.data.ngrams import Counts, Events, em, mix

OFFSETS = (2, 3, 4)
FIT_SLOTS = 2**14
MOST_ENTRIES = 2**26  # of fitted slots x vocabulary: 256 MiB in float32
PENALTIES = (0.1, 0.01, 0.001)  # tried from the largest on, as long as the held quarter gains
ITERATIONS = 60


@dataclass(frozen=True)
class Probed:
    """The losses of one offset on the measured slots, (W, T - 3) nats each."""

    probe: np.ndarray
    table: np.ndarray
    unigram: np.ndarray
    penalty: float
    gradient: float  # largest entry at the end of the fit: 0 at the optimum


def probe(
    fit_states: np.ndarray,
    fit_tokens: np.ndarray,
    states: np.ndarray,
    tokens: np.ndarray,
    *,
    offset: int,
    vocab_size: int,
) -> Probed:
    """states: (W, T, C) and tokens: (W, T+1 or more), of the windows to fit on and of others. The
    slots are those from which every one of OFFSETS lies in the window.
    """
    slots = states.shape[1] - (OFFSETS[-1] - 1)
    x, y = fit_states[:, :slots], fit_tokens[:, offset : offset + slots]
    test, labels = states[:, :slots], tokens[:, offset : offset + slots]
    mean, sd = x.mean((0, 1)), x.std((0, 1)) + 1e-6
    inputs = torch.from_numpy(((x - mean) / sd).astype(np.float32))
    targets = torch.from_numpy(np.ascontiguousarray(y))
    held = max(1, len(inputs) // 4)
    weights = _start(targets[:-held].flatten(), inputs.shape[2], vocab_size)
    best: tuple[float, float] | None = None
    for penalty in PENALTIES if len(inputs) > held else ():
        weights, _ = fit(weights, inputs[:-held].flatten(0, 1), targets[:-held].flatten(), penalty)
        loss = float(losses(weights, inputs[-held:], targets[-held:]).mean())
        if best is not None and loss >= best[0]:
            break
        best = loss, penalty
    penalty = best[1] if best else PENALTIES[0]
    start = _start(targets.flatten(), inputs.shape[2], vocab_size)
    weights, gradient = fit(start, inputs.flatten(0, 1), targets.flatten(), penalty)
    measured = torch.from_numpy(((test - mean) / sd).astype(np.float32))
    goal = torch.from_numpy(np.ascontiguousarray(labels))
    table, unigram = table_losses(fit_tokens[:, :slots], y, tokens[:, :slots], labels, vocab_size)
    found = losses(weights, measured, goal).double().numpy()
    return Probed(found, table, unigram, penalty, gradient)


def _start(targets: Tensor, width: int, vocab_size: int) -> Tensor:
    """(C+1, V): no slope, and the log frequencies in the last row."""
    counts = torch.bincount(targets, minlength=vocab_size).float() + 1
    return torch.cat([torch.zeros(width, vocab_size), (counts / counts.sum()).log()[None]])


def fit(
    start: Tensor, inputs: Tensor, targets: Tensor, penalty: float, *, iterations: int = ITERATIONS
) -> tuple[Tensor, float]:
    """Minimises mean cross-entropy + penalty / 2 |slopes|^2; the constants are free.

    inputs: (N, C) -> (C+1, V) weights, and the largest entry of the gradient there.
    """
    weights = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [weights], max_iter=iterations, tolerance_grad=1e-6, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        logits = torch.addmm(weights[-1], inputs, weights[:-1])
        loss = torch.nn.functional.cross_entropy(logits, targets)
        loss = loss + penalty / 2 * weights[:-1].square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    closure()
    assert weights.grad is not None
    return weights.detach(), float(weights.grad.abs().max())


@torch.no_grad()
def losses(weights: Tensor, inputs: Tensor, targets: Tensor) -> Tensor:
    """(W, n, C), (W, n) -> (W, n) nats."""
    logits = torch.matmul(inputs, weights[:-1]) + weights[-1]
    return torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none")


def table_losses(
    contexts: np.ndarray,
    targets: np.ndarray,
    new_contexts: np.ndarray,
    new_targets: np.ndarray,
    vocab_size: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Nats of a table context -> target, and of the targets' frequencies, of the new pairs. Both
    are counted from the first pairs, (W, n) each, and interpolated as data/ngrams.py says, with the
    weights that a quarter of these windows gives.
    """

    def events(after: np.ndarray, before: np.ndarray) -> Events:
        return Events(after.ravel(), (np.zeros(after.size, np.int64), before.ravel()))

    held = max(1, len(targets) // 4)
    fitted = events(targets[:-held], contexts[:-held])
    rest = events(targets[-held:], contexts[-held:])
    everything, new = events(targets, contexts), events(new_targets, new_contexts)
    lower, known = (np.full(n, 1 / vocab_size) for n in (new.target.size, targets[-held:].size))
    found = []
    for length in (0, 1):
        share, seen = Counts(fitted, length, vocab_size).shares(rest)
        weights = em(share, known, seen)
        known = mix(share, seen, weights, known)
        share, seen = Counts(everything, length, vocab_size).shares(new)
        lower = mix(share, seen, weights, lower)
        found.append(-np.log(lower).reshape(new_targets.shape))
    return found[1], found[0]
