"""Sums of suffixes: the first answer token needs every term."""

from typing import ClassVar, Literal

from dsv3_mtp.config.task import TASKS
from dsv3_mtp.tasks.base import AtLeast2, Draws, Example, ExampleTask, LossOn


@TASKS.register
class SuffixSumTask(ExampleTask):
    """x_1..x_n = y_1..y_n, y_k the sum of x_k..x_n: y_1 needs every term, each later one two."""

    METRICS: ClassVar[dict[str, tuple[str, str | None]]] = ExampleTask.METRICS | {
        "task/first_sum": ("first sum, by generation", "higher")
    }
    hard_metric: ClassVar[str | None] = "task/first_sum"

    type: Literal["suffix_sum"] = "suffix_sum"
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

    def example(self, draws: Draws) -> Example:
        """`x_1 .. x_n = y_1 .. y_n`, y_k = x_k + .. + x_n mod p. Residues are 0..p-1, `=` is p."""
        terms = [draws.below(self.modulus) for _ in range(self.terms)]
        sums = [sum(terms[k:]) % self.modulus for k in range(self.terms)]
        return Example([*terms, self.modulus, *sums], [(self.terms + 1, 2 * self.terms + 1)])
