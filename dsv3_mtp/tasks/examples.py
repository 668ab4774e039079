"""The examples of `data.task`, one after another from a seed: what they look like and how they fill
a row.

Example e of a stream is a pure function of the stream's key and e, so that a sampler's position is
one integer and any rank can make any row. Training examples are fresh for ever; a small task
repeats itself (suffix_sum with 4 terms mod 3 has 81 examples), so that its validation examples are
met in training.
"""

import bisect
import hashlib
import itertools
import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dsv3_mtp.config import InductionTask, MarkovTask, PolynomialTask, StarTask, SuffixSumTask, Task
from dsv3_mtp.tasks.markov import stationary, transition_matrix

# of the examples: to be raised with any change to them, so that no run is resumed on other data
VERSION = 1


class Draws:
    """Random numbers of a key. numpy fixes the raw output of a generator for ever, so these stay
    the same too.
    """

    def __init__(self, *key: int) -> None:
        self._raw = np.random.PCG64(np.random.SeedSequence(key)).random_raw

    def below(self, limit: int) -> int:
        return self._raw() % limit  # the bias is limit / 2^64

    def sample(self, limit: int, count: int) -> list[int]:
        """`count` different numbers below `limit`, in random order."""
        return np.argsort(self._raw(limit), kind="stable")[:count].tolist()

    def uniform(self, count: int) -> list[float]:
        """In [0, 1)."""
        return ((self._raw(count) >> np.uint64(11)) * 2.0**-53).tolist()


@dataclass(frozen=True)
class Example:
    """Answers are the spans [start, stop) of `tokens` that the model has to generate from all
    tokens before them.
    """

    tokens: list[int]
    answers: list[tuple[int, int]]
    group: int | None = None  # what accuracy is also counted by: the number of operations


@dataclass(frozen=True)
class TaskSource:
    """A stream of examples in the place of a `Source`: endless, so without a number of tokens or
    documents.
    """

    task: Task
    bytes: None = field(default=None, init=False)
    tokens: None = field(default=None, init=False)
    documents: None = field(default=None, init=False)

    @property
    def path(self) -> str:
        return f"data.task {self.task.type}"

    @property
    def vocab_size(self) -> int:
        return self.task.vocab_size

    @property
    def manifest_hash(self) -> str:
        settings = json.dumps(self.task.model_dump(mode="json"), sort_keys=True)
        return hashlib.sha256(f"{VERSION} {settings}".encode()).hexdigest()


class TaskStream:
    """Rows of whole examples, as many as T + 1 tokens hold; what is left of a row is padding.
    Markov: one long walk.

    key: (seed, number of the source) for training; None for validation, the same examples in every
        run.
    """

    def __init__(self, source: TaskSource, seq_len: int, key: tuple[int, int] | None) -> None:
        task = source.task
        self.task, self.key = task, (1,) if key is None else (0, *key)
        self.per_row = 1 if isinstance(task, MarkovTask) else (seq_len + 1) // task.example_length
        if isinstance(task, MarkovTask):
            self.walks = Walks(task.states, task.sharpness, task.chain_seed)
        elif isinstance(task, InductionTask):
            self.walks = Walks(task.filler_tokens, 2.0, 0)

    def sample(self, index: int, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Row `index` of `length` = T + 1 + D tokens: tokens, number of the example, and which
        tokens are targets.

        Padding is an example of its own and no target. The first T + 1 tokens are the same for
        every D.
        """
        if isinstance(self.task, MarkovTask):
            walk = self.walks.walk(Draws(*self.key, index), length)
            return np.array(walk), np.zeros(length, np.int64), np.ones(length, bool)
        tokens = np.full(length, self.task.vocab_size - 1, np.int64)
        documents, scored = np.full(length, self.per_row, np.int64), np.zeros(length, bool)
        start = 0
        for number, example in enumerate(self.examples(index)):
            stop = start + len(example.tokens)
            tokens[start:stop], documents[start:stop] = example.tokens, number
            spans = example.answers if self.task.loss_on == "answer" else [(0, stop - start)]
            for first, last in spans:
                scored[start + first : start + last] = True
            start = stop
        return tokens, documents, scored

    def spread(
        self, index: int, count: int, length: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Validation row `index` of `count`: every row is as good as any other."""
        return self.sample(index, length)

    def examples(self, index: int) -> list[Example]:
        """The examples of row `index`; none of a Markov source."""
        if isinstance(self.task, MarkovTask):
            return []
        numbers = range(index * self.per_row, (index + 1) * self.per_row)
        return [self._example(self.task, Draws(*self.key, number)) for number in numbers]

    def _example(self, task: Any, draws: Draws) -> Example:
        match task:
            case StarTask():
                return star(task, draws)
            case InductionTask():
                return induction(task, draws, self.walks)
            case SuffixSumTask():
                return suffix_sum(task, draws)
            case _:
                return polynomial(task, draws)


class Walks:
    """Walks through `markov.transition_matrix`, started from its stationary distribution."""

    def __init__(self, states: int, sharpness: float, chain_seed: int) -> None:
        chain = transition_matrix(states, sharpness=sharpness, chain_seed=chain_seed)
        self.start = self._cumulative(stationary(chain))
        self.rows = [self._cumulative(row) for row in chain]

    def walk(self, draws: Draws, length: int) -> list[int]:
        states: list[int] = []
        for uniform in draws.uniform(length):
            states.append(
                bisect.bisect_right(self.rows[states[-1]] if states else self.start, uniform)
            )
        return states

    @staticmethod
    def _cumulative(probabilities: np.ndarray) -> list[float]:
        return probabilities.cumsum()[
            :-1
        ].tolist()  # without the last, which rounding may leave below 1


def star(task: StarTask, draws: Draws) -> Example:
    """`a b | b c | ... / start goal =` and the path, edges shuffled and directed away from the
    start.

    As the code of arXiv 2403.06963 writes it without its commas: nodes are 0..N-1, then | = / and
    $, here padding.
    """
    bar, equals, slash = range(task.nodes, task.nodes + 3)
    steps = task.path_length - 1
    start, *others = draws.sample(task.nodes, 1 + task.degree * steps)
    paths = [[start, *others[arm * steps : (arm + 1) * steps]] for arm in range(task.degree)]
    edges = [edge for path in paths for edge in itertools.pairwise(path)]
    tokens: list[int] = []
    for number in draws.sample(len(edges), len(edges)):
        tokens += [*edges[number], bar]
    tokens[-1:] = [slash, start, paths[0][-1], equals]
    answer = paths[0][::-1] if task.reverse else paths[0]
    return Example(tokens + answer, [(len(tokens), len(tokens) + len(answer))])


def induction(task: InductionTask, draws: Draws, walks: Walks) -> Example:
    """Filler and names in turn, gaps of random length. Tokens: those of names, then those of
    filler.
    """
    tokens_of_names = draws.sample(task.name_tokens, 2 * task.names)
    space = task.length - 2 * task.mentions
    cuts = sorted(draws.below(space + 1) for _ in range(task.mentions - 1))
    mentions = [draws.below(task.names) for _ in range(task.mentions)]
    filler = [task.name_tokens + state for state in walks.walk(draws, space)]
    tokens: list[int] = []
    answers, seen = [], set()
    for begin, end, name in zip([0, *cuts], [*cuts, space], mentions, strict=True):
        tokens += filler[begin:end] + tokens_of_names[2 * name : 2 * name + 2]
        if name in seen:
            answers.append((len(tokens) - 1, len(tokens)))
        seen.add(name)
    return Example(tokens, answers)


def suffix_sum(task: SuffixSumTask, draws: Draws) -> Example:
    """`x_1 .. x_n = y_1 .. y_n`, y_k = x_k + .. + x_n mod p. Residues are 0..p-1, `=` is p."""
    terms = [draws.below(task.modulus) for _ in range(task.terms)]
    sums = [sum(terms[k:]) % task.modulus for k in range(task.terms)]
    return Example([*terms, task.modulus, *sums], [(task.terms + 1, 2 * task.terms + 1)])


def polynomial(task: PolynomialTask, draws: Draws) -> Example:
    """Operators before their operands, `=`, the value; a polynomial is its coefficients, the
    constant first.

    Residues are 0..p-1, then negation, `+`, `*`, composition f(g(X)) as `o f g`, and `=`. Of the
    operations an expression has, the operator and the split over the operands are uniform (arXiv
    2404.19737 does not say how).
    """
    operations = 1 + draws.below(task.max_operations)
    tokens, value = _expression(task, draws, operations)
    tokens.append(task.modulus + 4)
    return Example(tokens + value, [(len(tokens), len(tokens) + task.degree)], operations)


def _expression(task: PolynomialTask, draws: Draws, operations: int) -> tuple[list[int], list[int]]:
    """Tokens and value of a random expression with that many operations."""
    modulus = task.modulus
    if not operations:
        leaf = [draws.below(modulus) for _ in range(task.degree)]
        return leaf, leaf
    operator = draws.below(4)
    if operator == 0:
        tokens, value = _expression(task, draws, operations - 1)
        return [modulus, *tokens], [-c % modulus for c in value]
    left = draws.below(operations)
    (first, f), (second, g) = (
        _expression(task, draws, count) for count in (left, operations - 1 - left)
    )
    if operator == 1:
        value = [(a + b) % modulus for a, b in zip(f, g, strict=True)]
    elif operator == 2:
        value = _product(f, g, modulus)
    else:
        value = [0] * task.degree
        for coefficient in reversed(f):  # Horner
            value = _product(value, g, modulus)
            value[0] = (value[0] + coefficient) % modulus
    return [modulus + operator, *first, *second], value


def _product(f: list[int], g: list[int], modulus: int) -> list[int]:
    """Of the ring: powers from X^degree on vanish."""
    return [sum(f[i] * g[k - i] for i in range(k + 1)) % modulus for k in range(len(f))]
