"""What the program asks of a generated task. The tasks themselves are files of dsv3_mtp/tasks."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Protocol

from dsv3_mtp.config.registry import Registry
from dsv3_mtp.config.section import Section

Array = Any  # of numpy, which the config does without
# prompts, and how many tokens to give for each: the greedy continuations
Generate = Callable[[list[list[int]], int], list[list[int]]]


class Stream(Protocol):
    """Rows of a data source, each a pure function of its index."""

    def sample(self, index: int, length: int) -> tuple[Array, ...]:
        """Training row `index` of `length` = T + 1 + D tokens: tokens (length,) int64; number of
        the document of each (length,) int64, from 0; of a task also (length,) bool: which are
        targets.
        """

    def spread(self, index: int, count: int, length: int) -> tuple[Array, ...]:
        """Validation row `index` of `count`; in a stream without end, by `index` alone."""
        return self.sample(index, length)


class Grading(Protocol):
    """Counts of one validation that add up over ranks: `mark`, sum `sums`, `metrics`."""

    sums: Array  # (n,) float64

    def mark(self, rows: Sequence[int], windows: Sequence[Sequence[Array]]) -> None:
        """The examples of some validation rows; windows: these rows as the model has read them."""

    def metrics(self, sums: list[float], losses: dict[str, float]) -> dict[str, float]:
        """`task/...` from the sums over all ranks. losses: `val/main_loss`, `val/mtp_loss/k`."""


class Task(Section):
    """A generated source of tokens, with its grading. Its keys are the fields of the class."""

    type: str

    METRICS: ClassVar[dict[str, tuple[str, str | None]]] = {}
    """Name of a metric -> (its words, {} being k; which way is better: lower, higher or None)."""
    VERSION: ClassVar[int] = 1
    """To be raised with any change to the examples, so that no run is resumed on other data."""
    EVERY: ClassVar[dict[str, tuple[str, str | None]]] = {}
    """The metrics of all tasks that are imported, those of a file of one's own as well."""
    has_answers: ClassVar[bool] = True
    """A model answers by generating; false: there is a known theory of its losses."""

    @classmethod
    def __pydantic_init_subclass__(cls, **settings: Any) -> None:
        super().__pydantic_init_subclass__(**settings)
        Task.EVERY.update(cls.METRICS)

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Token ids, padding included."""

    @property
    @abstractmethod
    def example_length(self) -> int:
        """Tokens of the longest example."""

    @abstractmethod
    def stream(self, seq_len: int, key: tuple[int, int] | None) -> Stream:
        """key: (seed, number of the source) for training; None for validation, always the same."""

    @abstractmethod
    def grading(self, seq_len: int, mtp: Any, generate: Generate) -> Grading:
        """mtp: the heads' MTPConfig."""

    def prompts(self, count: int) -> tuple[list[list[int]], int] | None:
        """The text before the last answer of `count` validation examples, and the length of the
        answers; None: rows of the stream are prompts.
        """
        return None

    def reference(self, mtp: Any) -> dict[str, float]:
        """What heads reach at their lowest cross-entropy, metric by metric; {}: unknown."""
        return {}

    def facts(self, seq_len: int, mtp: Any) -> dict[str, str]:
        """Lines of the dry run."""
        text = f"examples of {self.example_length} tokens; {self.vocab_size} token ids"
        return {f"task {self.type}": text}


TASKS: Registry[Task] = Registry("task", Task, "dsv3_mtp.tasks")
