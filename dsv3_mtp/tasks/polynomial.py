"""Arithmetic of polynomials over F_p (arXiv 2404.19737, 4.2)."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from dsv3_mtp.config.section import Integer
from dsv3_mtp.config.task import TASKS
from dsv3_mtp.tasks.base import AtLeast2, Draws, Example, ExampleTask, LossOn


@TASKS.register
class PolynomialTask(ExampleTask):
    """Expressions in F_p[X]/(X^degree) and their value (arXiv 2404.19737, 4.2), prefix notation."""

    METRICS: ClassVar[dict[str, tuple[str, str | None]]] = ExampleTask.METRICS | {
        "task/exact_match/k": ("exact match with {} operations, by generation", None)
    }

    type: Literal["polynomial"] = "polynomial"
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

    def example(self, draws: Draws) -> Example:
        """Operators before operands, `=`, the value; polynomials with the constant first.

        Residues are 0..p-1, then negation, `+`, `*`, composition f(g(X)) as `o f g`, and `=`. Of
        the operations an expression has, the operator and the split over the operands are uniform
        (arXiv 2404.19737 does not say how).
        """
        operations = 1 + draws.below(self.max_operations)
        tokens, value = _expression(self, draws, operations)
        tokens.append(self.modulus + 4)
        return Example(tokens + value, [(len(tokens), len(tokens) + self.degree)], operations)

    @property
    def groups(self) -> int:
        """Graded by the number of operations, too."""
        return self.max_operations


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
    first, f = _expression(task, draws, left)
    second, g = _expression(task, draws, operations - 1 - left)
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
