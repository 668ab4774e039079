"""The `data` section: prepared text, or a generated task whose right answers are known.

What the examples of a task look like is in dsv3_mtp/tasks/examples.py. The last token id of every
task but markov is the padding behind the examples of a row. `example_length` is in tokens, that of
the longest example.
"""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from dsv3_mtp.config.model import FilePath, Integer, Number, OnResume, Positive, Section
from dsv3_mtp.config.reader import Problem, show

LossOn = Literal["answer", "all"]
AtLeast2 = Annotated[Integer, Field(ge=2, le=4096)]
Seed = Annotated[Integer, Field(ge=0, lt=2**63)]


class MarkovTask(Section):
    """Walks through one random chain of order 1: entropies and best acceptance in closed form
    (data/markov.py).
    """

    type: Literal["markov"]
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
        """A walk is as long as its row; the shortest has one target."""
        return 2


class StarTask(Section):
    """Path-star graphs G(degree, path_length) as arXiv 2403.06963 writes them: edges / start goal =
    path.
    """

    type: Literal["star"]
    degree: AtLeast2 = 2
    """Paths that leave the start, d."""
    path_length: AtLeast2 = 3
    """Nodes of a path with start and goal, l."""
    nodes: AtLeast2 = 10
    """Labels that the nodes of a graph are drawn from, N."""
    reverse: bool = False
    """Answer from the goal to the start: the paper's control, which next-token prediction
    solves.
    """
    loss_on: LossOn = "answer"
    """answer: the path (arXiv 2403.06963); all: the graph too."""

    @property
    def vocab_size(self) -> int:
        """Nodes, then `|` `=` `/` and the padding (the paper's `$`)."""
        return self.nodes + 4

    @property
    def example_length(self) -> int:
        return 3 * self.degree * (self.path_length - 1) + 3 + self.path_length

    def rules(self) -> Iterator[Problem]:
        needed = self.degree * (self.path_length - 1) + 1
        if self.nodes < needed:
            yield (
                "nodes",
                (
                    f"must be >= {needed}, the nodes of a graph "
                    f"with {self.degree} paths (got {self.nodes})"
                ),
            )


class InductionTask(Section):
    """Names of two random tokens in Markov filler: the second is known once seen (after arXiv
    2404.19737, 4.1).
    """

    type: Literal["induction"]
    length: Annotated[Integer, Field(ge=4, le=2**20)] = 48
    """Tokens of a story, which ends with a name."""
    names: AtLeast2 = 2
    """Characters of a story; their names are drawn anew for each story."""
    mentions: AtLeast2 = 6
    """Names in a story; those of a character already seen are the answers."""
    name_tokens: AtLeast2 = 16
    """Tokens that names are made of."""
    filler_tokens: AtLeast2 = 16
    """Tokens of the text between names."""
    loss_on: LossOn = "all"
    """all: every token (arXiv 2404.19737); answer: second tokens of names already seen."""

    @property
    def vocab_size(self) -> int:
        return self.name_tokens + self.filler_tokens + 1

    @property
    def example_length(self) -> int:
        return self.length

    def rules(self) -> Iterator[Problem]:
        if self.mentions <= self.names:
            text = f"must be > data.task.names = {self.names}, or no name need come back"
            yield "mentions", f"{text} (got {self.mentions})"
        if self.name_tokens < 2 * self.names:
            text = f"must be >= {2 * self.names}: the tokens of {self.names} names all differ"
            yield "name_tokens", f"{text} (got {self.name_tokens})"
        if self.length < 2 * self.mentions:
            yield (
                "length",
                f"must be >= {2 * self.mentions}, two tokens for each mention (got {self.length})",
            )


class SuffixSumTask(Section):
    """x_1..x_n = y_1..y_n with y_k the sum of x_k..x_n: the first answer token needs every term,
    each later one two.
    """

    type: Literal["suffix_sum"]
    terms: AtLeast2 = 4
    """n."""
    modulus: AtLeast2 = 3
    """p: sums are mod p, terms uniform in 0..p-1."""
    loss_on: LossOn = "answer"
    """answer: the sums; all: the terms too, which are noise."""

    @property
    def vocab_size(self) -> int:
        """Residues, `=`, padding."""
        return self.modulus + 2

    @property
    def example_length(self) -> int:
        return 2 * self.terms + 1


class PolynomialTask(Section):
    """Expressions in F_p[X]/(X^degree) and their value (arXiv 2404.19737, 4.2); the notation is
    ours: prefix.
    """

    type: Literal["polynomial"]
    max_operations: Annotated[Integer, Field(ge=1, le=64)] = 5
    """Operations of an expression are uniform in 1..max_operations (arXiv 2404.19737: 5)."""
    modulus: AtLeast2 = 7
    """p: coefficients are uniform in 0..p-1."""
    degree: Annotated[Integer, Field(ge=1, le=64)] = 5
    """Coefficients of a polynomial."""
    loss_on: LossOn = "answer"
    """answer: the coefficients of the value; all: the expression too."""

    @property
    def vocab_size(self) -> int:
        """Residues, negation, `+`, `*`, composition, `=`, padding."""
        return self.modulus + 6

    @property
    def example_length(self) -> int:
        return (self.degree + 1) * self.max_operations + 2 * self.degree + 1


Task = Annotated[
    MarkovTask | StarTask | InductionTask | SuffixSumTask | PolynomialTask,
    Field(discriminator="type"),
]


class DataEntry(Section):
    """One corpus of a mixture."""

    path: FilePath
    """Prepared folder or Megatron prefix."""
    weight: Positive
    """Relative share of the sampled sequences."""


def _one_or_many(value: Any) -> str:
    return "<one>" if isinstance(value, str) else "<many>"


class DataConfig(Section):
    """Where tokens come from: text, with documents packed (V3 4.1), or a generated task."""

    on_resume = OnResume.RECORDED

    train: (
        Annotated[
            Annotated[FilePath, Tag("<one>")] | Annotated[tuple[DataEntry, ...], Tag("<many>")],
            Discriminator(_one_or_many),
        ]
        | None
    ) = None
    """Prepared folder, Megatron prefix (PREFIX.bin, PREFIX.idx), or a list of {path, weight}; null
    with a task.
    """
    val: FilePath | None = None
    """Prepared folder (its validation split) or Megatron prefix; null with a task."""
    task: Annotated[Task | None, OnResume.FIXED] = None
    """Generated examples with known answers instead of text; null: text."""
    build: Annotated[Literal["pystdlib", "sitelib"] | None, OnResume.FREE] = None
    """Corpus to build into the folder `train` when it is missing: the standard library of the
    running interpreter, or that and all of its site-packages (data/sitelib.py).
    """
    seq_len: Annotated[Integer, Field(ge=2), OnResume.FIXED]
    """Positions per sequence, T (V3 4.2: 4096). A sample holds T + 1 + D tokens."""
    mask_documents: Annotated[bool, OnResume.FIXED] = False
    """Mask attention, targets and MTP inputs across document boundaries (V3 4.1: not done)."""

    @property
    def entries(self) -> tuple[DataEntry, ...]:
        """`train` as a mixture: a single corpus is one entry of weight 1; none with a task."""
        return (
            (DataEntry(path=self.train, weight=1.0),)
            if isinstance(self.train, str)
            else self.train or ()
        )

    def rules(self) -> Iterator[Problem]:
        if self.task is not None:
            yield from self._task_rules(self.task)
            return
        for key in ("train", "val"):
            if getattr(self, key) is None:
                yield key, "missing; name prepared data here, or set data.task"
        if self.train == ():
            yield "train", "must name at least one corpus (got [])"
        if self.build is not None and isinstance(self.train, tuple):
            yield (
                "build",
                f"needs one folder in data.train, not a list; set null (got {show(self.build)})",
            )

    def _task_rules(self, task: Task) -> Iterator[Problem]:
        for key in ("train", "val", "build"):
            if (value := getattr(self, key)) is not None:
                yield key, f"must be null: data.task generates the data (got {show(value)})"
        length = task.example_length
        if self.seq_len < length - 1:
            text = (
                f"must be >= {length - 1}: an example of {task.type} "
                f"has {length} tokens, the last is only a target"
            )
            yield "seq_len", f"{text} (got {self.seq_len})"
        elif task.type != "markov" and self.seq_len + 1 >= 2 * length and not self.mask_documents:
            text = (
                f"must be true: seq_len = {self.seq_len} packs "
                "several examples, and none may see another"
            )
            yield (
                "mask_documents",
                f"{text}; or set data.seq_len to {length - 1} for one (got false)",
            )
