"""What goes into the losses of a model, and what comes out."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

from torch import Tensor

# Micro-batches: tokens, documents (None without masks), scored (None: every token is a target),
# each (B, T+1+D).
Batch = Sequence[tuple[Tensor, Tensor | None, Tensor | None]]


@dataclass(frozen=True)
class LossSettings:
    """What the micro-batches of an optimizer step have in common (V3 eqs. 17, 24, 25)."""

    # (D,) lambda * w_k / D, the factor of each L_k; None: of the model's own `mtp` section at the
    # start of a run
    loss_weights: tuple[float, ...] | None = None
    balance_loss_weight: float = 0.0  # alpha of eq. 17
    # (2+D+terms,) from `MTPLoss.counts`, of the whole optimizer step; None: of the
    # micro-batch alone
    normalizer: Tensor | None = None
    # measure it too, without gradient: about twice the losses' logits again
    overlap: bool = False


@dataclass(frozen=True)
class MTPOutput:
    """One micro-batch. `loss` has a gradient; everything else is detached and adds up over
    micro-batches and ranks.

    No tuple: DeepSpeed divides the gradient of every tensor that it finds in an output by the
        accumulation count.
    """

    loss: Tensor  # scalar: main + sum_k weight_k L_k + alpha * balance, in the normalizer's units
    nll_sum: Tensor  # (1+D,) summed cross-entropy of each depth, depth 0 = main
    targets: Tensor  # (1+D,) number of valid targets of each depth
    correct: Tensor  # (1+D,) top1: teacher-forced argmax equals the label
    # (D,) agreement: argmax of depths 1..k all equal the main model's own argmax for that token
    agreed: Tensor
    compared: Tensor  # (D,) slots in which that comparison exists
    overlap: Tensor  # (4, D) of model/overlap.py `overlap_sums`: zeros where it was not asked for
    term_sum: Tensor  # (terms,) losses that the heads own, summed; heads/base.py: `terms`
    term_count: Tensor  # (terms,)
    balance: Tensor  # scalar: sum over sequences and routers of sum_i f_i P_i
    load: Tensor  # (routers, E) tokens per expert, trunk routers first
    # (routers,) sum over tokens of the groups (V3: nodes) that the token's experts lie in
    nodes: Tensor

    def __add__(self, other: "MTPOutput") -> "MTPOutput":
        return MTPOutput(
            *(getattr(self, field.name) + getattr(other, field.name) for field in fields(self))
        )

    def sums(self) -> "MTPOutput":
        """All of it detached and in float64, to be added up."""
        return MTPOutput(*(getattr(self, field.name).detach().double() for field in fields(self)))
