"""What tasks of examples share: random numbers, rows of examples, and grading by generation.

Example e of a stream is a pure function of the stream's key and e, so that a sampler's position is
one integer and any rank can make any row. Training examples are fresh for ever; a small task
repeats itself (suffix_sum with 4 terms mod 3 has 81 examples), so that its validation examples are
met in training.
"""

import hashlib
import json
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from dsv3_mtp.config.reader import show
from dsv3_mtp.config.section import Integer
from dsv3_mtp.config.task import Generate, Stream, Task

LossOn = Literal["answer", "all"]
AtLeast2 = Annotated[Integer, Field(ge=2, le=4096)]

ROWS = 1024  # prompts that are decoded together


class Draws:
    """Random numbers of a key: raw output of a generator, which numpy has fixed for ever."""

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
    """`answers`: spans [start, stop) of `tokens` that are to be generated from what precedes."""

    tokens: list[int]
    answers: list[tuple[int, int]]
    group: int | None = None  # what accuracy is also counted by: the number of operations


class ExampleTask(Task):
    """A task that is a stream of examples with answers. A kind of it has `example`, `vocab_size`,
    `example_length` and the key `loss_on`; the last token id is the padding behind the examples of
    a row.

    task/exact_match is the share of examples with every answer right, generated greedily from the
    true tokens before it. One token of each answer is also counted alone, that which cannot be
    copied (`hard_metric`, `hard_token`), and examples of each group (`groups`).
    """

    METRICS: ClassVar[dict[str, tuple[str, str | None]]] = {
        "task/exact_match": ("exact match by generation", "higher")
    }
    hard_metric: ClassVar[str | None] = None
    """Name of the metric of the hard token; None: it is not counted."""

    loss_on: LossOn

    @abstractmethod
    def example(self, draws: Draws) -> Example:
        """One example from these random numbers."""

    @property
    def hard_token(self) -> int:
        """Place in an answer of the token that cannot be copied."""
        return 0

    @property
    def groups(self) -> int:
        """Examples have a group of 1 .. groups; 0: they have none."""
        return 0

    def stream(self, seq_len: int, key: tuple[int, int] | None) -> "ExampleStream":
        return ExampleStream(self, seq_len, key)

    def grading(self, seq_len: int, mtp: Any, generate: Generate) -> "ExampleGrading":
        return ExampleGrading(self, self.stream(seq_len, None), generate)

    def prompts(self, count: int) -> tuple[list[list[int]], int]:
        stream = self.stream(self.example_length - 1, None)  # one example per row
        examples = [example for row in range(count) for example in stream.examples(row)]
        spans = [example.answers[-1] for example in examples]
        pairs = zip(examples, spans, strict=True)
        texts = [example.tokens[:start] for example, (start, _) in pairs]
        return texts, max(stop - start for start, stop in spans)

    def facts(self, seq_len: int, mtp: Any) -> dict[str, str]:
        per_row = self.stream(seq_len, None).per_row
        text = f"examples of {self.example_length} tokens, {per_row} per row of {seq_len + 1}"
        return {f"task {self.type}": f"{text}; {self.vocab_size} token ids"}


class ExampleStream(Stream):
    """Rows of whole examples, as many as T + 1 tokens hold; what is left of a row is padding."""

    def __init__(self, task: ExampleTask, seq_len: int, key: tuple[int, int] | None) -> None:
        self.task, self.key = task, (1,) if key is None else (0, *key)
        self.per_row = (seq_len + 1) // task.example_length

    def sample(self, index: int, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Row `index` of `length` = T + 1 + D tokens: tokens, number of the example, and which
        tokens are targets.

        Padding is an example of its own and no target. The first T + 1 tokens are the same for
        every D.
        """
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

    def examples(self, index: int) -> list[Example]:
        """The examples of row `index`."""
        numbers = range(index * self.per_row, (index + 1) * self.per_row)
        made = [self.task.example(Draws(*self.key, number)) for number in numbers]
        return [checked(self.task, example) for example in made]


def checked(task: ExampleTask, example: Any) -> Example:
    """What a task's `example` has made, if it keeps to what the task says of itself.

    Raises:
        ValueError: it does not.
    """
    if not isinstance(example, Example):
        raise ValueError(f"data.task: {task.type} makes a {type(example).__name__}, no Example")
    wrong, tokens = None, np.array(example.tokens)
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        wrong = f"tokens that are not whole numbers: {show(example.tokens)}"
    elif not 0 < len(tokens) <= task.example_length:
        wrong = f"{len(tokens)} tokens, where example_length is {task.example_length}"
    elif tokens.min() < 0 or tokens.max() >= task.vocab_size:
        wrong = f"ids {tokens.min()}..{tokens.max()}, where vocab_size is {task.vocab_size}"
    elif not all(0 < start < stop <= len(tokens) for start, stop in example.answers):
        wrong = f"answers {show(example.answers)} in {len(tokens)} tokens, the first a prompt"
    if wrong is not None:
        raise ValueError(f"data.task: an example of {task.type} has {wrong}")
    return example


class ExampleGrading:
    """Answers generated from their prompts, compared with the true ones.

    sums: examples, those right, answers, their hard tokens right, then examples by group, those
    right by group.
    """

    def __init__(self, task: ExampleTask, stream: ExampleStream, generate: Generate) -> None:
        self.task, self.stream, self.generate = task, stream, generate
        self.sums = np.zeros(4 + 2 * task.groups)

    def mark(self, rows: Sequence[int], windows: Sequence[Sequence[np.ndarray]]) -> None:
        examples = [example for row in rows for example in self.stream.examples(row)]
        questions = [(example, *span) for example in examples for span in example.answers]
        given: list[list[int]] = []
        for first in range(0, len(questions), ROWS):
            part = questions[first : first + ROWS]
            longest = max(stop - start for _, start, stop in part)
            given += self.generate([example.tokens[:start] for example, start, _ in part], longest)
        answers = iter(given)
        for example in examples:
            self._count(example, [next(answers) for _ in example.answers])

    def _count(self, example: Example, answers: list[list[int]]) -> None:
        true = [example.tokens[start:stop] for start, stop in example.answers]
        pairs = list(zip(true, answers, strict=True))
        right = all(answer == given[: len(answer)] for answer, given in pairs)
        hard = self.task.hard_token
        self.sums[:2] += 1, right
        self.sums[2:4] += len(pairs), sum(answer[hard] == given[hard] for answer, given in pairs)
        if example.group is not None:
            self.sums[3 + example.group] += 1
            self.sums[3 + self.task.groups + example.group] += right

    def metrics(self, sums: list[float], losses: dict[str, float]) -> dict[str, float]:
        examples, right, answers, hard = sums[:4]
        found = {"task/exact_match": right / examples}
        if self.task.hard_metric is not None:
            found[self.task.hard_metric] = hard / max(answers, 1)
        groups = self.task.groups
        by_group = zip(sums[4:][:groups], sums[4 + groups :], strict=True)
        for group, (count, good) in enumerate(by_group, 1):
            if count:
                found[f"task/exact_match/{group}"] = good / count
        return found


@dataclass(frozen=True)
class TaskSource:
    """A task as a data source: endless, so without a number of tokens or documents."""

    task: Task
    bytes: None = field(default=None, init=False)
    tokens: None = field(default=None, init=False)
    documents: None = field(default=None, init=False)
    text: None = field(default=None, init=False)
    tokenizer_sha256: None = field(default=None, init=False)
    longest_document: None = field(default=None, init=False)

    @property
    def path(self) -> str:
        return f"data.task {self.task.type}"

    @property
    def vocab_size(self) -> int:
        return self.task.vocab_size

    def id_range(self) -> tuple[int, int]:
        return 0, self.task.vocab_size - 1

    @property
    def manifest_hash(self) -> str:
        settings = json.dumps(self.task.model_dump(mode="json"), sort_keys=True)
        return hashlib.sha256(f"{self.task.VERSION} {settings}".encode()).hexdigest()

    def stream(self, seq_len: int, key: tuple[int, int] | None) -> Stream:
        return self.task.stream(seq_len, key)
