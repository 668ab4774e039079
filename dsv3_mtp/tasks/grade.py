"""How well a model does a task: answers generated from their prompts, or its losses against the
true source's.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dsv3_mtp.config import MarkovTask, MTPConfig, PolynomialTask, StarTask, Task
from dsv3_mtp.decode.draft import no_drafter
from dsv3_mtp.decode.generate import Settings, generate
from dsv3_mtp.model.causal_lm import DeepseekV3MTP
from dsv3_mtp.tasks.examples import Example, TaskStream
from dsv3_mtp.tasks.markov import (
    best_acceptance,
    best_agreement,
    cross_entropy,
    source_nll,
    transition_matrix,
)

ROWS = 1024  # prompts that are decoded together
PARTS = {"star": "first_node", "induction": "second_token", "suffix_sum": "first_sum"}


class Grade:
    """Counts of one validation that add up over ranks: `mark`, sum `sums` over the ranks,
    `metrics`.

    task/exact_match is the share of examples with every answer right, generated greedily from the
    true tokens before it. One token of each answer is also counted alone, that which cannot be
    copied (PARTS); polynomials also by their number of operations.
    """

    def __init__(self, model: DeepseekV3MTP, task: Task) -> None:
        self.model, self.task = model, task
        self.groups = task.max_operations if isinstance(task, PolynomialTask) else 0
        size = 2 + model.depths if isinstance(task, MarkovTask) else 4 + 2 * self.groups
        # examples, those right, answers, their hard tokens right, then examples by group, those
        # right by group; markov: targets of a depth, then the summed negative log-likelihood of the
        # true source at each depth
        self.sums = torch.zeros(size, dtype=torch.float64)

    def mark(
        self, stream: TaskStream, rows: Sequence[int], windows: Sequence[Sequence[np.ndarray]]
    ) -> None:
        """The examples of some validation rows; `windows` are the same rows as the model has read
        them.
        """
        if isinstance(self.task, MarkovTask):
            for tokens, *_ in windows:
                self.sums += self._true_nll(self.task, tokens)
            return
        examples = [example for row in rows for example in stream.examples(row)]
        questions = [(example, *span) for example in examples for span in example.answers]
        given: list[list[int]] = []
        for first in range(0, len(questions), ROWS):
            part = questions[first : first + ROWS]
            longest = max(stop - start for _, start, stop in part)
            prompts = [example.tokens[:start] for example, start, _ in part]
            given += generate(self.model, prompts, Settings(max_new_tokens=longest)).tokens
        answers = iter(given)
        for example in examples:
            self._count(example, [next(answers) for _ in example.answers])

    def _count(self, example: Example, answers: list[list[int]]) -> None:
        pairs = [
            (example.tokens[a:b], given)
            for (a, b), given in zip(example.answers, answers, strict=True)
        ]
        right = all(true == given[: len(true)] for true, given in pairs)
        hard = hard_token(self.task)
        self.sums[:2] += torch.tensor([1.0, right])
        self.sums[2:4] += torch.tensor(
            [len(pairs), sum(true[hard] == given[hard] for true, given in pairs)]
        )
        if example.group is not None:
            self.sums[3 + example.group] += 1
            self.sums[3 + self.groups + example.group] += right

    def _true_nll(self, task: MarkovTask, tokens: np.ndarray) -> Tensor:
        """(2+D,) targets of a depth, then the sum over them at each depth; tokens (b, T+1+A)."""
        mtp = self.model.mtp_config
        length, sums = tokens.shape[1] - mtp.lookahead, []
        for head, read, aim in heads_on(_chain(task), mtp):
            sums.append(source_nll(head, tokens[:, read:][:, :length], tokens[:, aim:][:, :length]))
        return torch.tensor([len(tokens) * length, *sums], dtype=torch.float64)

    def metrics(self, sums: list[float], losses: dict[str, float]) -> dict[str, float]:
        """From the sums over all ranks. losses: `val/main_loss` and `val/mtp_loss/k` of the same
        rows.
        """
        if isinstance(self.task, MarkovTask):
            names = [
                "val/main_loss",
                *(f"val/mtp_loss/{k}" for k in range(1, 1 + self.model.depths)),
            ]
            targets, *true = sums
            return {
                f"task/excess_loss/{k}": losses[name] - true[k] / targets
                for k, name in enumerate(names)
            }
        examples, right, answers, hard = sums[:4]
        found = {"task/exact_match": right / examples}
        if self.task.type in PARTS:
            found[f"task/{PARTS[self.task.type]}"] = hard / max(answers, 1)
        for group, (count, good) in enumerate(
            zip(sums[4:][: self.groups], sums[4 + self.groups :], strict=True), 1
        ):
            if count:
                found[f"task/exact_match/{group}"] = good / count
        return found


def reference(task: Task, mtp: MTPConfig) -> dict[str, float]:
    """What heads at their lowest cross-entropy reach on a Markov source (data/markov.py); {} for
    other tasks.

    Losses and agreement under their metric names; `acceptance/T0/joint/k`, `acceptance/T1/joint/k`
    and `acceptance/T?/tokens_per_step` (1 + accepted) are those of one step behind real text.
    """
    if not isinstance(task, MarkovTask):
        return {}
    chain, depths = _chain(task), range(1, 1 + mtp.depths)
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
    if no_drafter(mtp) is not None:
        return found
    for temperature, shares in enumerate(joint):
        found |= {f"acceptance/T{temperature}/joint/{k}": shares[k - 1] for k in depths}
        found[f"acceptance/T{temperature}/tokens_per_step"] = 1 + sum(shares)
    return found


def heads_on(chain: np.ndarray, mtp: MTPConfig) -> list[tuple[np.ndarray, int, int]]:
    """Of depth 0..D at their lowest cross-entropy on a chain: Q (S, S), and which tokens its row
    and its column are: t_{i+read}, t_{i+offset}.
    """
    rows = mtp.kind.theory(mtp, chain).rows if mtp.depths else []
    reads = [mtp.kind.horizon(mtp, depth) for depth in range(1, 1 + mtp.depths)]
    return list(zip([chain, *rows], [0, *reads], mtp.offsets, strict=True))


def _chain(task: MarkovTask) -> np.ndarray:
    return transition_matrix(task.states, sharpness=task.sharpness, chain_seed=task.chain_seed)


def hard_token(task: Task) -> int:
    """Place in the answer of the token that cannot be copied: the node after the start, the sum of
    all terms.
    """
    if isinstance(task, StarTask):
        return task.path_length - 2 if task.reverse else 1
    return 0
