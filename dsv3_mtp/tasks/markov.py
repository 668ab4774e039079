"""What can be known about a Markov source: its entropies, and how often the best heads' drafts are
accepted.

"Best" is a head that reaches the lowest cross-entropy there is for what it sees. A module that sees
the token before its target equals the main head on a chain of order 1. A head of depth k that sees
no tokens after t_i predicts t_{i+k+1} with row t_i of P^(k+1). What the best head of a kind
predicts is said by that kind (heads/base.py: `theory`).

P: (S, S) transition probabilities, row = from. Q: (S, S) what a head predicts, row = the last token
that it has read. Entropies in nats.
"""

import bisect
import functools
import math
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from dsv3_mtp.config.section import Integer, Number
from dsv3_mtp.config.task import TASKS, Generate, Stream, Task
from dsv3_mtp.tasks.base import AtLeast2, Draws

Seed = Annotated[Integer, Field(ge=0, lt=2**63)]


@TASKS.register
class MarkovTask(Task):
    """Walks through a random chain of order 1, whose entropies and best acceptance are known."""

    METRICS: ClassVar[dict[str, tuple[str, str | None]]] = {
        "task/excess_loss/k": (
            "loss of depth {} above that of the true source, nats per token",
            "lower",
        )
    }
    has_answers: ClassVar[bool] = False

    type: Literal["markov"] = "markov"
    states: AtLeast2 = 32
    """Tokens of the vocabulary."""
    sharpness: Annotated[Number, Field(ge=0, le=100)] = 2.0
    """Standard deviation of the transition logits: 0 is uniform noise, more is more predictable."""
    chain_seed: Seed = 0
    """Of the transition matrix, which is the same in every run."""

    @property
    def vocab_size(self) -> int:
        return self.states

    @property
    def example_length(self) -> int:
        """The shortest row: one token and its target. A walk fills its row."""
        return 2

    @property
    def chain(self) -> np.ndarray:
        return transition_matrix(self.states, sharpness=self.sharpness, chain_seed=self.chain_seed)

    def stream(self, seq_len: int, key: tuple[int, int] | None) -> "WalkStream":
        return WalkStream(walks(self.states, self.sharpness, self.chain_seed), key)

    def grading(self, seq_len: int, mtp: Any, generate: Generate) -> "ExcessLoss":
        return ExcessLoss(self.chain, mtp)

    def reference(self, mtp: Any) -> dict[str, float]:
        """Losses and agreement under their metric names; `acceptance/T0/joint/k`,
        `acceptance/T1/joint/k` and `acceptance/T?/tokens_per_step` (1 + accepted) are those of one
        step behind real text.
        """
        chain, depths = self.chain, range(1, 1 + mtp.depths)
        heads = heads_on(chain, mtp)
        losses = [cross_entropy(chain, head, aim - read) for head, read, aim in heads]
        found = {"val/main_loss": losses[0]}
        found |= {f"val/mtp_loss/{k}": losses[k] for k in depths}
        if not mtp.depths:
            return found
        theory, offsets = mtp.kind.theory(mtp, chain), [aim for _, _, aim in heads[1:]]
        if all(read == aim - 1 and (head == chain).all() for head, read, aim in heads):
            agreed, joint = [1.0] * mtp.depths, [[1.0] * mtp.depths] * 2  # each is the main head
        elif all(read == 0 for _, read, _ in heads):
            agreed = best_agreement(chain, theory.rows, offsets)
            greedy = theory.greedy or [head.argmax(1) for head in theory.rows]
            joint = [best_acceptance(chain, theory.rows, greedy, temperature=t) for t in (0, 1)]
        else:  # only the losses are known
            return found
        found |= {f"val/agreement/{k}": agreed[k - 1] for k in depths}
        # The shares are of a drafter (a sentence: there is none) that drafts one token per depth.
        if isinstance(mtp.kind.drafter(mtp), str) or offsets != [k + 1 for k in depths]:
            return found
        for temperature, shares in enumerate(joint):
            found |= {f"acceptance/T{temperature}/joint/{k}": shares[k - 1] for k in depths}
            found[f"acceptance/T{temperature}/tokens_per_step"] = 1 + sum(shares)
        return found

    def facts(self, seq_len: int, mtp: Any) -> dict[str, str]:
        best = self.reference(mtp)
        return {f"task markov: best {name}": f"{value:.4f}" for name, value in best.items()}


class WalkStream(Stream):
    """Rows of one long walk each, without padding."""

    def __init__(self, walks: "Walks", key: tuple[int, int] | None) -> None:
        self.walks, self.key = walks, (1,) if key is None else (0, *key)

    def sample(self, index: int, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        walk = self.walks.walk(Draws(*self.key, index), length)
        return np.array(walk), np.zeros(length, np.int64), np.ones(length, bool)


class ExcessLoss:
    """The losses of a model above those of the true source on the same tokens.

    sums: targets of a depth, then the summed negative log-likelihood of the true source at each
    depth.
    """

    def __init__(self, chain: np.ndarray, mtp: Any) -> None:
        self.heads, self.lookahead = heads_on(chain, mtp), mtp.lookahead
        self.sums = np.zeros(1 + len(self.heads))

    def mark(self, rows: Sequence[int], windows: Sequence[Sequence[np.ndarray]]) -> None:
        for tokens, *_ in windows:
            self.sums += self._true_nll(tokens)

    def _true_nll(self, tokens: np.ndarray) -> np.ndarray:
        """(2+D,) targets of a depth, then the sum over them at each depth; tokens (b, T+1+A)."""
        length, sums = tokens.shape[1] - self.lookahead, []
        for head, read, aim in self.heads:
            sums.append(source_nll(head, tokens[:, read:][:, :length], tokens[:, aim:][:, :length]))
        return np.array([len(tokens) * length, *sums])

    def metrics(self, sums: list[float], losses: dict[str, float]) -> dict[str, float]:
        names = ["val/main_loss", *(f"val/mtp_loss/{k}" for k in range(1, len(self.heads)))]
        targets, *true = sums
        excess = [losses[name] - nll / targets for name, nll in zip(names, true, strict=True)]
        return {f"task/excess_loss/{k}": value for k, value in enumerate(excess)}


def heads_on(chain: np.ndarray, mtp: Any) -> list[tuple[np.ndarray, int, int]]:
    """Of depth 0..D at their lowest cross-entropy on a chain: Q (S, S), and which tokens its row
    and its column are: t_{i+read}, t_{i+offset}.
    """
    rows = mtp.kind.theory(mtp, chain).rows if mtp.depths else []
    reads = [mtp.kind.horizon(mtp, depth) for depth in range(1, 1 + mtp.depths)]
    return list(zip([chain, *rows], [0, *reads], mtp.offsets, strict=True))


@functools.cache
def walks(states: int, sharpness: float, chain_seed: int) -> "Walks":
    """The walks of a chain, which is made once."""
    return Walks(states, sharpness, chain_seed)


class Walks:
    """Walks through `transition_matrix`, started from its stationary distribution."""

    def __init__(self, states: int, sharpness: float, chain_seed: int) -> None:
        chain = transition_matrix(states, sharpness=sharpness, chain_seed=chain_seed)
        self.start = self._cumulative(stationary(chain))
        self.rows = [self._cumulative(row) for row in chain]

    def walk(self, draws: Draws, length: int) -> list[int]:
        states, row = list[int](), self.start
        for uniform in draws.uniform(length):
            states.append(bisect.bisect_right(row, uniform))
            row = self.rows[states[-1]]
        return states

    @staticmethod
    def _cumulative(probabilities: np.ndarray) -> list[float]:
        return probabilities.cumsum()[:-1].tolist()  # rounding may leave the last below 1


def transition_matrix(states: int, *, sharpness: float, chain_seed: int) -> np.ndarray:
    """(S, S): softmax of `sharpness` times standard normal logits, always the same."""
    raw = np.random.PCG64(np.random.SeedSequence(chain_seed)).random_raw(2 * states * states)
    uniform = ((raw >> np.uint64(11)) + np.uint64(1)) * 2.0**-53  # in (0, 1]
    radius, angle = np.sqrt(-2 * np.log(uniform[::2])), 2 * np.pi * uniform[1::2]  # Box and Muller
    weights = np.exp(sharpness * (radius * np.cos(angle)).reshape(states, states))
    return weights / weights.sum(1, keepdims=True)


def stationary(chain: np.ndarray) -> np.ndarray:
    """(S,) pi with pi P = pi, which every positive matrix has, and only one."""
    states = len(chain)
    equations = np.vstack([chain.T - np.eye(states), np.ones(states)])
    return np.linalg.lstsq(equations, np.append(np.zeros(states), 1.0), rcond=None)[0].clip(min=0)


def step_entropy(chain: np.ndarray, steps: int) -> float:
    """H(t_{i+steps} | t_i); with k+1 steps the best loss of a parallel head of depth k."""
    return cross_entropy(chain, np.linalg.matrix_power(chain, steps), steps)


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
