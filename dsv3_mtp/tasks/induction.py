"""Names that come back in a story (after arXiv 2404.19737, 4.1)."""

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from dsv3_mtp.config.reader import Problem
from dsv3_mtp.config.section import Integer
from dsv3_mtp.config.task import TASKS
from dsv3_mtp.tasks.base import AtLeast2, Draws, Example, ExampleTask, LossOn
from dsv3_mtp.tasks.markov import walks


@TASKS.register
class InductionTask(ExampleTask):
    """Names of two tokens in Markov filler, known once seen (after arXiv 2404.19737, 4.1)."""

    METRICS: ClassVar[dict[str, tuple[str, str | None]]] = ExampleTask.METRICS | {
        "task/second_token": ("second token of a known name, by generation", "higher")
    }
    hard_metric: ClassVar[str | None] = "task/second_token"

    type: Literal["induction"] = "induction"
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
            text = f"must be >= {2 * self.mentions}, two tokens for each mention"
            yield "length", f"{text} (got {self.length})"

    def example(self, draws: Draws) -> Example:
        """Filler and names in turn, with random gaps; the ids of names come before filler's."""
        tokens_of_names = draws.sample(self.name_tokens, 2 * self.names)
        space = self.length - 2 * self.mentions
        cuts = sorted(draws.below(space + 1) for _ in range(self.mentions - 1))
        mentions = [draws.below(self.names) for _ in range(self.mentions)]
        states = walks(self.filler_tokens, 2.0, 0).walk(draws, space)
        filler = [self.name_tokens + state for state in states]
        tokens: list[int] = []
        answers, seen = [], set()
        for begin, end, name in zip([0, *cuts], [*cuts, space], mentions, strict=True):
            tokens += filler[begin:end] + tokens_of_names[2 * name : 2 * name + 2]
            if name in seen:
                answers.append((len(tokens) - 1, len(tokens)))
            seen.add(name)
        return Example(tokens, answers)
