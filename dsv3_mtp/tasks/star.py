"""Path-star graphs (arXiv 2403.06963): the node after the start cannot be copied."""

import itertools
from collections.abc import Iterator
from typing import ClassVar, Literal

from dsv3_mtp.config.reader import Problem
from dsv3_mtp.config.section import Boolean
from dsv3_mtp.config.task import TASKS
from dsv3_mtp.tasks.base import AtLeast2, Draws, Example, ExampleTask, LossOn


@TASKS.register
class StarTask(ExampleTask):
    """Path-star graphs G(degree, path_length) (arXiv 2403.06963): edges / start goal = path."""

    METRICS: ClassVar[dict[str, tuple[str, str | None]]] = ExampleTask.METRICS | {
        "task/first_node": ("first node of the path, by generation", "higher")
    }
    hard_metric: ClassVar[str | None] = "task/first_node"

    type: Literal["star"] = "star"
    degree: AtLeast2 = 2
    """Paths that leave the start, d."""
    path_length: AtLeast2 = 3
    """Nodes of a path with start and goal, l."""
    nodes: AtLeast2 = 10
    """Labels that the nodes of a graph are drawn from, N."""
    reverse: Boolean = False
    """Answer from the goal to the start: the control, which next-token prediction solves."""
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
            text = f"must be >= {needed}, the nodes of a graph with {self.degree} paths"
            yield "nodes", f"{text} (got {self.nodes})"

    def example(self, draws: Draws) -> Example:
        """`a b | b c | ... / start goal =` and the path, edges shuffled, away from the start.

        As the code of arXiv 2403.06963 has it without its commas; its $ is the padding.
        """
        bar, equals, slash = range(self.nodes, self.nodes + 3)
        steps = self.path_length - 1
        start, *others = draws.sample(self.nodes, 1 + self.degree * steps)
        paths = [[start, *others[arm * steps : (arm + 1) * steps]] for arm in range(self.degree)]
        edges = [edge for path in paths for edge in itertools.pairwise(path)]
        tokens: list[int] = []
        for number in draws.sample(len(edges), len(edges)):
            tokens += [*edges[number], bar]
        tokens[-1:] = [slash, start, paths[0][-1], equals]
        answer = paths[0][::-1] if self.reverse else paths[0]
        return Example(tokens + answer, [(len(tokens), len(tokens) + len(answer))])

    @property
    def hard_token(self) -> int:
        """The node after the start."""
        return self.path_length - 2 if self.reverse else 1
