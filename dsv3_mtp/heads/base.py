"""What a kind of head is: the one object that the rest of the program asks about it.

A kind of head is a subclass of `Head` in one file: its options, its training form, its decode form
and drafter, its cost, its export rule and its theory. A subclass with a `name` registers itself
under `mtp.mode: NAME`; one in a file of your own is used as `mtp.mode: package.module:Class`.
Nothing else compares names. docs/extend.md shows one in full.

Depth is 1-based, 0 is the main head. Slot i of depth k predicts t_{i+offset(k)} and has read the
tokens up to t_{i+horizon(k)}; positions are the anchor's (slot i's own) at every depth.

How a loss gets the students' logits of a range of slots and their targets. The model collects the
rows of all heads, the main head's first, as `HeadRows(inputs, depths, outputs)`; inputs are
(B, T, .) tensors. For the slots a..b-1 of the flattened B*T slots:

    part = [x.flatten(0, 1)[a:b] for x in rows.inputs]
    opened(rows.outputs, part, lambda part, weights: rows.outputs[-1].logits(part, weights))
                                                   # (b - a, V), of every depth in rows.depths
    targets[depth].flatten()[a:b]                  # (b - a,), targets: (1+D, B, T)

`opened` (model/states.py) holds the weights of several outputs whole at once under ZeRO-3, so that
a student's and the teacher's logits can be made side by side: pass `[*teacher.outputs,
*student.outputs]` and cut the weights again. With `mtp.detach: all` the shared head's weight is a
constant for every depth but 0.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from dsv3_mtp.config import ModelConfig, MTPConfig
from dsv3_mtp.config.reader import Problem
from dsv3_mtp.config.section import Section
from dsv3_mtp.model.layers import RMSNorm
from dsv3_mtp.model.moe import Experts
from dsv3_mtp.model.states import HeadInputs, HeadOutput, LMHead, Output, Scores

if TYPE_CHECKING:
    from dsv3_mtp.decode.draft import Drafter
    from dsv3_mtp.model.trunk import Trunk

# context in which a parameter that is kept in parts can be read and written
Writable = Callable[[Tensor], AbstractContextManager[Any]]
REGISTRY: dict[str, type["Head"]] = {}


class SharedHead(nn.Module):
    """The norm in front of the shared output head; every module owns one (`shared_head.norm`)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


@dataclass(frozen=True)
class Cost:
    """What a head computes for one token; a test compares it with torch's FLOP counter."""

    blocks: Sequence[nn.Module] = ()  # decoder layers, one entry for each time one is computed
    products: Sequence[nn.Module] = ()  # other modules with weights, likewise
    shared: int = 0  # rows of a slot that the shared output head scores
    own: Sequence[Output] = ()  # output heads of its own, one entry for each row that one scores
    attentions: int = 0  # how often every slot attends to its row, beside `blocks`
    # The rows are the trunk's own states: with mtp.detach there is no gradient into them.
    rows_of_trunk: bool = False
    kept: float = 0  # elements per token kept for the backward, those of `blocks` not counted
    # products of the trunk's own states, and of embeddings where tokens are read: there is no
    # gradient into what they read where these learn nothing (mtp.detach, train.freeze)
    first: Sequence[nn.Module] = ()
    first_of_trunk: Sequence[nn.Module] = ()  # likewise, of the trunk's states alone


@dataclass(frozen=True)
class Export:
    """What of a head goes into DeepSeek-V3's layout."""

    modules: int = 0  # stored as model.layers.{L+k-1}
    # why it cannot be exported, one sentence each
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # what the user should know


@dataclass(frozen=True)
class Theory:
    """The best that a kind of head can learn on a Markov chain with S states (tasks/markov.py)."""

    # of each depth (S, S): row = the last token that is read, t_{i+horizon}; the distribution of
    # its target at the lowest cross-entropy
    rows: Sequence[np.ndarray]
    # of each depth (S,): the token that a greedy drafter drafts; None: the argmax of `rows`
    greedy: Sequence[np.ndarray] | None = None


class Head(nn.Module, ABC):
    """All extra heads of a model, `model.mtp`. Its parameters are `mtp.*` in checkpoints.

    Class methods are asked before anything is built, with the `mtp` section of the config.
    """

    name: ClassVar[str | None] = None  # of `mtp.mode`; None: package.module:Class
    default: ClassVar[bool] = False  # what `mtp.mode` is where a config does not say

    # The keys of `mtp:` that only this kind of head has. A checkpoint fits only these as they were.
    Options: ClassVar[type[Section]] = Section

    def __init_subclass__(cls, **settings: Any):
        super().__init_subclass__(**settings)
        if "name" in cls.__dict__ and cls.name is not None:
            REGISTRY[cls.name] = cls

    def __init__(self, config: ModelConfig, mtp: MTPConfig):
        super().__init__()
        self.config, self.mtp = config, mtp
        self.options: Any = mtp.options

    @classmethod
    def problems(cls, mtp: MTPConfig) -> Iterator[Problem]:
        """What it cannot be asked for beside the types of its options: (key of `mtp:`, text)."""
        yield from ()

    # --- what it reads and predicts -------------------------------------------------------------

    @classmethod
    @abstractmethod
    def reads(cls, mtp: MTPConfig) -> frozenset[str | int]:
        """The trunk states it reads: "last_input", "pre_norm", "post_norm", or j for the output of
        trunk layer j (0-based), which pipeline stages cannot give it.
        """

    @classmethod
    def has_experts(cls, config: ModelConfig, mtp: MTPConfig) -> bool:
        """It has routed experts, and so a router."""
        with torch.device("meta"):
            return any(isinstance(module, Experts) for module in cls(config, mtp).modules())

    @classmethod
    def has_weights(cls, config: ModelConfig, mtp: MTPConfig) -> bool:
        """There is something in it that learns."""
        with torch.device("meta"):
            return any(True for _ in cls(config, mtp).parameters())

    @classmethod
    def offset(cls, mtp: MTPConfig, depth: int) -> int:
        """Slot i of `depth` is scored against t_{i+offset}. A sample has T + the largest offset
        tokens.
        """
        return depth + 1

    @classmethod
    def horizon(cls, mtp: MTPConfig, depth: int) -> int:
        """Slot i of `depth` reads no token after t_{i+horizon}; less than the offset."""
        return 0

    # --- training -------------------------------------------------------------------------------

    def start(self, trunk: "Trunk", lm_head: LMHead, writable: Writable) -> None:
        """What does not start at N(0, initializer_range) is set here, under torch.no_grad: once all
        weights are drawn, and again once a trunk is read from elsewhere. See `copy_weights`.

        trunk, lm_head: of the main model. What of the trunk is on another pipeline stage has no
            values here; the trunk's last layer is here if the heads read `last_input`.
        """

    @abstractmethod
    def forward(self, inputs: HeadInputs) -> HeadOutput:
        """The rows of all depths, and the stats of every router in the order of `modules()`."""

    @classmethod
    def terms(cls, mtp: MTPConfig) -> Mapping[str, float]:
        """Losses of its own: name -> factor. L gets factor * sum / count of each, beside lambda;
        they are logged as mtp_term/NAME.
        """
        return {}

    @classmethod
    def count_terms(cls, mtp: MTPConfig, valid: Tensor, taught: Tensor) -> Tensor:
        """(terms,) how often each term is counted in a micro-batch. It is summed over the whole
        step before any forward, so that it can depend on nothing but which targets are valid.

        valid: (1+D, B, T) bool; taught: (D, B, T) bool, and the main head predicts the target too.
        """
        return valid.new_zeros(0, dtype=valid.dtype).long()

    # `loss_terms` reads `Scores.overlap`, which costs the logits of heads and teacher once more
    # where no objective has a teacher.
    overlap_in_terms: ClassVar[bool] = False

    @classmethod
    def denominators(cls, counts: Tensor, weights: Tensor) -> Tensor:
        """(.., D) what the sums of depths are divided by, from counts (.., D) and weights (D,)."""
        return counts

    def loss_terms(self, output: HeadOutput, scores: Scores) -> Mapping[str, Tensor]:
        """The sums of `terms` over this micro-batch, scalars with a gradient."""
        return {}

    def confidence(self, output: HeadOutput) -> Tensor | None:
        """(D, B, T) in [0, 1], what it gives for the overlap of each depth; None: nothing."""
        return None

    @abstractmethod
    def cost(self) -> Cost:
        """What it computes for a token."""

    # --- decoding -------------------------------------------------------------------------------

    @classmethod
    def drafter(cls, mtp: MTPConfig) -> "type[Drafter] | str":
        """What drafts with it, or why nothing does, in a sentence without its mode."""
        return "has no drafter"

    def decode_forms(self, model: nn.Module) -> list[Any]:
        """What the drafter runs, made once for each `generate`: `Decoder.heads`."""
        return []

    # --- DeepSeek-V3's layout -------------------------------------------------------------------

    @classmethod
    def export(cls, config: ModelConfig, mtp: MTPConfig) -> Export:
        """What of it the layout holds."""
        why = f"mtp.mode: {mtp.mode}: the layout has no place for such heads"
        return Export(problems=[f"{why}; export the trunk alone with --trunk-only"])

    @classmethod
    def load(cls, config: ModelConfig, mtp: MTPConfig, stored: int, trunk_hidden: str) -> Export:
        """What of `stored` modules of the layout this head takes over.

        trunk_hidden: the state of the trunk that the first of them was trained on, post_norm or
            pre_norm.
        """
        return Export(notes=[f"the {mtp.depths} {mtp.mode} head(s)"])

    # --- theory ---------------------------------------------------------------------------------

    @classmethod
    def theory(cls, mtp: MTPConfig, chain: np.ndarray) -> Theory:
        """On the Markov chain `chain` (S, S), row = from."""
        steps = [cls.offset(mtp, k) - cls.horizon(mtp, k) for k in range(1, 1 + mtp.depths)]
        return Theory([np.linalg.matrix_power(chain, step) for step in steps])


def copy_weights(source: nn.Module, target: nn.Module, writable: Writable) -> None:
    """Parameters and buffers of `target` become those of `source`, where either may be kept in
    parts: for `Head.start`.

    Raises:
        ValueError: they differ in names or shapes, or `source` is on another pipeline stage.
    """
    given = {**dict(source.named_parameters()), **dict(source.named_buffers())}
    own = {**dict(target.named_parameters()), **dict(target.named_buffers())}
    if given.keys() != own.keys():
        names = ", ".join(sorted(given.keys() ^ own.keys()))
        raise ValueError(f"a head cannot start from another module's weights: only one has {names}")
    for name, tensor in given.items():
        if tensor.is_meta:
            raise ValueError(
                f"parallel.pipeline_stages: heads start from weights of the trunk ({name}) that "
                "another stage has; the last one has the last layer where heads read last_input"
            )
        with torch.no_grad(), writable(tensor):
            values = tensor.detach().clone()
        with torch.no_grad(), writable(own[name]):
            own[name].copy_(values)
