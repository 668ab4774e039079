"""What can be known about a Markov source: its entropies, and how often the best heads' drafts are
accepted.

"Best" is a head that reaches the lowest cross-entropy there is for what it sees. A sequential
module sees the token before its target, so on a chain of order 1 it equals the main head. A head of
depth k that sees no tokens after t_i (parallel, parallel_linear, sequential with `embed: false`)
predicts t_{i+k+1} with row t_i of P^(k+1).

P: (S, S) transition probabilities, row = from. Entropies in nats.
"""

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


def source_nll(chain: np.ndarray, before: np.ndarray, after: np.ndarray, steps: int) -> float:
    """Sum of -log P(after | before) over tokens that lie `steps` apart: what the best head loses on
    this sample.
    """
    return float(-np.log(np.linalg.matrix_power(chain, steps)[before, after]).sum())


def best_agreement(chain: np.ndarray, depths: int, *, reads_tokens: bool) -> list[float]:
    """P(argmax of depths 1..k all equal the main head's own) along real text, for k = 1..depths."""
    if reads_tokens:
        return [1.0] * depths
    pi, main = stationary(chain), chain.argmax(1)
    reached = np.eye(len(chain))  # [s, a]: P(t_{i+k} = a and all agreed so far | t_i = s)
    joint, power = [], chain
    for _ in range(depths):
        power = power @ chain
        reached = (reached @ chain) * (power.argmax(1)[:, None] == main[None, :])
        joint.append(float(pi @ reached.sum(1)))
    return joint


def best_acceptance(
    chain: np.ndarray, depths: int, *, temperature: int, reads_tokens: bool
) -> list[float]:
    """P(drafts 1..k all accepted) for k = 1..depths in one speculative step behind a prefix of real
    text.

    The main head has read t_i and chosen t_{i+1}; draft k stands for t_{i+k+1}, and the main head
    verifies it. Later steps of one generation start behind its own text, which is not a prefix from
    the source: their rate differs.

    Args:
        temperature: 0 (greedy), or 1 (acceptance by p/q, arXiv 2211.17192).

    Raises:
        ValueError: another temperature.
    """
    if temperature not in (0, 1):
        raise ValueError(f"temperature must be 0 or 1 (got {temperature})")
    if reads_tokens:
        return [1.0] * depths
    pi, main = stationary(chain), chain.argmax(1)
    # [s, a]: P(t_{i+1} = a | t_i = s)
    chosen = np.eye(len(chain))[main] if temperature == 0 else chain.copy()
    joint, power = [], chain
    for _ in range(depths):
        power = power @ chain
        for state, draft in enumerate(power):
            if temperature == 0:
                stands = main == draft.argmax()  # [a]: the main head behind a agrees
                chosen[state] = (chosen[state] @ stands) * (np.arange(len(chain)) == draft.argmax())
            else:
                chosen[state] = chosen[state] @ np.minimum(chain, draft)
        joint.append(float(pi @ chosen.sum(1)))
    return joint
