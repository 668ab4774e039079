"""What passes between trunk, heads and losses: trunk states, a head's inputs, its rows."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dsv3_mtp.model.moe import RouterStats
from dsv3_mtp.ops.compute import Shard


class TrunkStates(NamedTuple):
    """What heads may read, each (B, T, C)."""

    # input of the trunk's last layer: what Meta's heads share, that layer being head 1
    last_input: Tensor
    pre_norm: Tensor  # output of the trunk's last layer
    post_norm: Tensor  # after the trunk's final norm: what the main output head reads
    layers: dict[int, Tensor] = {}  # output of layer j, of those that a head asks for

    def detach(self) -> "TrunkStates":
        layers = {number: state.detach() for number, state in self.layers.items()}
        last_input, pre_norm, post_norm = (state.detach() for state in self[:3])
        return TrunkStates(last_input, pre_norm, post_norm, layers)


class Output(nn.Module):
    """From rows to logits. A head of its own kind overrides `logits`, and `weights` if its
    parameters are to come in another order than they are registered.
    """

    def weights(self) -> tuple[Tensor, ...]:
        """The parameters that `logits` reads."""
        return tuple(self.parameters(recurse=False))

    def logits(self, inputs: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
        """Rows of `HeadRows.inputs`, weights of all `HeadRows.outputs`, in order -> (n, V)."""
        raise NotImplementedError

    def forward(self, *inputs: Tensor, run: Callable[..., Any] | None = None) -> Any:
        """Logits of `inputs`, or what `run(*inputs)` returns while weights here are whole."""
        return self.logits(inputs, self.weights()) if run is None else run(*inputs)


class LMHead(nn.Linear, Output):
    """An output head: logits = hidden @ weight.T, without a bias."""

    constant = False

    def weights(self) -> tuple[Tensor, ...]:
        return (self.weight.detach() if self.constant else self.weight,)

    @contextmanager
    def held(self, constant: bool) -> Iterator[None]:
        """The weight learns nothing from logits that are made inside: of the main output head with
        `mtp.detach: all`, whatever a head does with it.
        """
        before, self.constant = self.constant, constant
        try:
            yield
        finally:
            self.constant = before

    def logits(self, inputs: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
        return nn.functional.linear(inputs[0], weights[0])

    def forward(self, *inputs: Tensor, run: Callable[..., Any] | None = None) -> Any:
        return Output.forward(self, *inputs, run=run)

    def head_logits(self, depth: int, states: "Tensor | HeadRows") -> Tensor:
        """Of some slots of `HeadOutput.by_depth` -> (B, n, V), for model/overlap.py."""
        return self(states) if isinstance(states, Tensor) else states.logits()


class HeadRows(NamedTuple):
    """One row for every slot, and what its logits are scored against.

    The rows of a bag head have several depths, those of a chain one each. A row of depth k at slot
    i is scored against t_{i+offset(k)}.
    """

    inputs: tuple[Tensor, ...]  # (B, T, .) each; the first is the hidden state (B, T, C)
    depths: tuple[int, ...]  # 0: the main head
    # The modules whose weights make the logits, the last one computes them: the shared head, one of
    # the head's own, or (shared head, own bias).
    outputs: tuple[Output, ...]

    def cut(self, first: int, stop: int) -> "HeadRows":
        """The rows of slots first..stop-1."""
        return self._replace(inputs=tuple(x[:, first:stop] for x in self.inputs))

    def logits(self) -> Tensor:
        """(B, T, V), with a gradient."""
        return opened(self.outputs, self.inputs, self.outputs[-1].logits)


@dataclass(frozen=True)
class HeadOutput:
    """What a head returns; of a model: the main head's rows first, the stats of the trunk first."""

    rows: list[HeadRows]
    stats: list[RouterStats | None] = field(default_factory=list)  # None: of a dense block
    kept: dict[str, Tensor] = field(default_factory=dict)  # for the head's own `loss_terms`

    @property
    def routed(self) -> list[RouterStats]:
        return [stats for stats in self.stats if stats is not None]

    def by_depth(self, depths: int) -> list[Tensor | HeadRows | None]:
        """Of a model: what `LMHead.head_logits` reads of depth 0..D, (B, T, C) of the main head,
        the rows of the others, None where a depth has none.
        """
        main, *heads = self.rows
        found: dict[int, HeadRows] = {depth: rows for rows in heads for depth in rows.depths}
        return [main.inputs[0], *(found.get(depth) for depth in range(1, 1 + depths))]

    def scored_slots(self, valid: Tensor, first: int = 0) -> Tensor:
        """`valid` of depths first..D, where depths that have no row become False."""
        there = {depth for rows in self.rows for depth in rows.depths}
        for number in range(len(valid)):
            if first + number not in there:
                valid[number] = False
        return valid


@dataclass(frozen=True)
class Scores:
    """What the losses have found, for the terms that a head owns. Each (1+D, B, T), no gradient."""

    nll: Tensor
    prediction: Tensor  # argmax
    targets: Tensor
    valid: Tensor  # bool: the target counts
    taught: Tensor  # (D, B, T) bool: and the main head predicts it as well
    overlap: Tensor  # (D, B, T) with the main head, where taught; of `Head.overlap_in_terms` only


def opened(
    outputs: Sequence[Output],
    inputs: Sequence[Tensor],
    run: Callable[[Sequence[Tensor], list[Tensor]], Any],
) -> Any:
    """run(inputs, weights of all outputs), inside the forward of each of them: ZeRO-3 gathers what
    a module holds while its forward runs, so that only there weights are whole.
    """
    if not outputs:
        return run(inputs, [])
    first, *rest = outputs

    def inner(*inputs: Tensor) -> Any:
        return opened(rest, inputs, lambda x, more: run(x, [*first.weights(), *more]))

    return first(*inputs, run=inner)


@dataclass(frozen=True)
class HeadInputs:
    """What a head is given of a micro-batch."""

    trunk: TrunkStates  # detached where mtp.detach says so
    embedded: Tensor  # (B, T-1+A, C): embeddings of t_1 .. t_{T-1+A}; A = lookahead - 1
    angles: Tensor  # (2, T, P/2) rotary angles of the slots
    mask: Tensor | None  # document mask of whole rows
    tokens: Tensor  # (B, T+1+A)
    documents: Tensor | None  # (B, T+1+A)
    lm_head: LMHead  # the shared output head
    keys: "Callable[[], Tensor]"  # (B, T) int64, see `uniform`
    shard: Shard  # which slots of the rows are here

    def ahead(self, distance: int) -> Tensor:
        """(B, T, C): at slot i the embedding of t_{i+distance}, distance >= 1; zero where that is
        a token of another document.
        """
        length = self.trunk.post_norm.shape[1]
        embedding = self.embedded[:, distance - 1 : distance - 1 + length]
        return embedding if self.documents is None else embedding * self.inside(distance)

    def tokens_ahead(self, distance: int) -> Tensor:
        """(B, T): t_{i+distance} of slot i."""
        return self.tokens[:, distance : distance + self.trunk.post_norm.shape[1]]

    def inside(self, distance: int) -> Tensor:
        """(B, T, 1) bool: t_{i+distance} is of the same document as t_i."""
        length = self.trunk.post_norm.shape[1]
        if self.documents is None:
            return torch.ones_like(self.tokens[:, :length, None], dtype=torch.bool)
        same = self.documents[:, distance : distance + length] == self.documents[:, :length]
        return same.unsqueeze(-1)

    def later(self, state: Tensor, by: int) -> tuple[Tensor, Tensor]:
        """(B, T, C): at slot i the state of slot i+by, with its gradient wherever that slot is; and
        (B, T) bool: there is such a slot in the row, in slot i's document. Elsewhere any values.

        Raises:
            ValueError: slot i+by may lie two shards of the row away.
        """
        length = state.shape[1]
        if by > length:
            raise ValueError(
                f"parallel.sequence_parallel_size: a shard of {length} slots is shorter than the "
                f"{by} slots that the heads look ahead; use fewer ranks for a row"
            )
        following = self.shard.following(state, by)
        missing = by - following.shape[1]  # the row ends here
        shifted = torch.cat([state[:, by:], following, state[:, :missing]], dim=1)
        there = torch.ones(state.shape[:2], dtype=torch.bool, device=state.device)
        there[:, length - missing :] = False
        if self.documents is not None:
            there &= self.documents[:, by : by + length] == self.documents[:, :length]
        return shifted, there

    def uniform(self, depth: int, draw: int = 0) -> Tensor:
        """(B, T) float64 in [0, 1): a hash of (seed, step, row, slot, depth, draw).

        The same in every layout of ranks, when a block is recomputed, and after a resume; a row is
        known by its tokens. In evaluation the step is always 0.
        """
        mixed = mix(self.keys() + (depth * 2**20 + draw))
        return (mixed >> 11).bitwise_and(2**53 - 1).double() * 2.0**-53


def mix(x: Tensor) -> Tensor:
    """The finaliser of splitmix64 on int64: every bit of x changes every bit of the result."""
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        x = (x ^ _shift(x, shift)) * factor
    return x ^ _shift(x, 31)


def _shift(x: Tensor, by: int) -> Tensor:
    return (x >> by).bitwise_and(2 ** (64 - by) - 1)


def row_keys(
    tokens: Tensor, first: int, gather: Callable[[Tensor], Tensor], *, seed: int, step: int
) -> Tensor:
    """(B, T) keys for `HeadInputs.uniform` from the tokens (B, T) of slots first..first+T-1.

    gather: puts the parts of a row side by side where ranks share it (`Rows.gather`).
    """
    slots = first + torch.arange(tokens.shape[1], device=tokens.device)
    start = mix(mix(torch.full_like(slots, seed)) + step)  # (T,), the same everywhere
    part = mix(mix(tokens + start) + slots).sum(1, keepdim=True)  # (B, 1)
    return mix(mix(gather(part).sum(1, keepdim=True) + start) + slots)
