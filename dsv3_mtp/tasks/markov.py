"""What can be known about a Markov source: its entropies, and how often the best heads' drafts are
accepted.

"Best" is a head that reaches the lowest cross-entropy there is for what it sees. A module that sees
the token before its target equals the main head on a chain of order 1. A head of depth k that sees
no tokens after t_i predicts t_{i+k+1} with row t_i of P^(k+1). What the best head of a kind predicts
is said by that kind (heads/base.py: `theory`).

P: (S, S) transition probabilities, row = from. Q: (S, S) what a head predicts, row = the last token
that it has read. Entropies in nats.
"""

import math
from collections.abc import Sequence

import numpy as np


def transition_matrix(states: int, *, sharpness: float, chain_seed: int) -> np.ndarray:
    """(S, S): softmax over each row of `sharpness` times standard normal logits. The same for
    ever.
    """
    raw = np.random.PCG64(np.random.SeedSequence(chain_seed)).random_raw(2 * states * states)
    uniform = ((raw >> np.uint64(11)) + np.uint64(1)) * 2.0**-53  # in (0, 1]
    radius, angle = np.sqrt(-2 * np.log(uniform[::2])), 2 * np.pi * uniform[1::2]  # Box and Muller
    weights = np.exp(sharpness * (radius * np.cos(angle)).reshape(states, states))
    return weights / weights.sum(1, keepdims=True)


def stationary(chain: np.ndarray) -> np.ndarray:
    """(S,) pi with pi P = pi. The chain must have one such distribution; every positive matrix
    does.
    """
    states = len(chain)
    equations = np.vstack([chain.T - np.eye(states), np.ones(states)])
    return np.linalg.lstsq(equations, np.append(np.zeros(states), 1.0), rcond=None)[0].clip(min=0)


def step_entropy(chain: np.ndarray, steps: int) -> float:
    """H(t_{i+steps} | t_i): with one step the entropy rate, with k+1 the best loss of a parallel
    head of depth k.
    """
    power = np.linalg.matrix_power(chain, steps)
    logs = np.log(power, out=np.zeros_like(power), where=power > 0)
    return float(-stationary(chain) @ (power * logs).sum(1))


def cross_entropy(chain: np.ndarray, head: np.ndarray, steps: int) -> float:
    """Loss of a head Q on the token `steps` after the last one that it has read."""
    power = np.linalg.matrix_power(chain, steps)
    if ((head == 0) & (power > 0)).any():
        return math.inf
    logs = np.log(head, out=np.zeros_like(head), where=head > 0)
    return float(-stationary(chain) @ (power * logs).sum(1))


def source_nll(head: np.ndarray, before: np.ndarray, after: np.ndarray) -> float:
    """Sum of -log Q(after | before): what a head Q loses on this sample."""
    return float(-np.log(head[before, after]).sum())


def best_agreement(
    chain: np.ndarray, heads: Sequence[np.ndarray], offsets: Sequence[int]
) -> list[float]:
    """P(argmax of depths 1..k all equal the main head's own) along real text, for k = 1..D.

    heads: Q of depth 1..D, which read nothing after t_i and predict t_{i+offset}.
    """
    pi, main = stationary(chain), chain.argmax(1)
    reached = np.eye(len(chain))  # [s, a]: P(t_{i+o-1} = a and all agreed so far | t_i = s)
    joint, at = [], 1
    for head, offset in zip(heads, offsets, strict=True):
        reached = reached @ np.linalg.matrix_power(chain, offset - at)
        reached, at = reached * (head.argmax(1)[:, None] == main[None, :]), offset
        joint.append(float(pi @ reached.sum(1)))
    return joint


def best_acceptance(
    chain: np.ndarray,
    heads: Sequence[np.ndarray],
    greedy: Sequence[np.ndarray],
    *,
    temperature: int,
) -> list[float]:
    """P(drafts 1..k all accepted) for k = 1..D in one speculative step behind a prefix of real
    text.

    The main head has read t_i and chosen t_{i+1}; draft k stands for t_{i+k+1}, and the main head
    verifies it. Later steps of one generation start behind its own text, which is not a prefix from
    the source: their rate differs.

    Args:
        heads: Q of depth 1..D, which read nothing after t_i.
        greedy: of each depth (S,) the token that it drafts at temperature 0, by t_i.
        temperature: 0 (greedy), or 1 (acceptance by p/q, arXiv 2211.17192).

    Raises:
        ValueError: another temperature.
    """
    if temperature not in (0, 1):
        raise ValueError(f"temperature must be 0 or 1 (got {temperature})")
    pi, main = stationary(chain), chain.argmax(1)
    # [s, a]: P(t_{i+1} = a | t_i = s)
    chosen = np.eye(len(chain))[main] if temperature == 0 else chain.copy()
    joint = []
    for head, drafts in zip(heads, greedy, strict=True):
        for state, draft in enumerate(drafts):
            if temperature == 0:
                stands = main == draft  # [a]: the main head behind a agrees
                chosen[state] = (chosen[state] @ stands) * (np.arange(len(chain)) == draft)
            else:
                chosen[state] = chosen[state] @ np.minimum(chain, head[state])
        joint.append(float(pi @ chosen.sum(1)))
    return joint
