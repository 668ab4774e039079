"""What the layers of a model call beside torch, given to them when they are built.

    with building(Compute(core=flash, recompute="selective")):
        model = DeepseekV3MTP(config, mtp)

works as `with torch.device(...)` does: each layer asks for `given()` in its constructor and keeps
what it needs. Nothing is put onto a module afterwards.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dsv3_mtp.ops.attention import Core
from dsv3_mtp.ops.experts import Stack, routed

Kind = Literal["attention", "dense_mlp", "shared_experts", "eh_proj"]
# (x (N, C), gates (N, K), gate_up (E, 2F, C), down (E, C, F), chosen (N, K), counts (E,)) -> (N, C)
Routed = Callable[[Tensor, Tensor, Tensor | Stack, Tensor | Stack, Tensor, Tensor], Tensor]


class Shard:
    """The slots of a batch's rows that this process computes. This class is for one process, which
    computes all of them; parallel/sequence.py has the shard `number` of `count`.
    """

    number, count = 0, 1

    def cut(self, x: Tensor, ahead: int) -> Tensor:
        """Whole rows (B, T + ahead) -> this shard's and those ahead, (B, T/count + ahead)."""
        length = (x.shape[1] - ahead) // self.count
        return x[:, self.number * length : (self.number + 1) * length + ahead].contiguous()

    def gather(self, x: Tensor) -> Tensor:
        """(B, T, ..) of this shard -> (B, count * T, ..) of all in order, without gradient."""
        return x

    def beyond(self, count: int) -> int:
        """How many of the next `count` slots of each row other processes have."""
        return 0

    def following(self, x: Tensor, count: int) -> Tensor:
        """(B, T, ..) of this shard -> (B, beyond(count), ..), the slots that follow it; their
        gradient goes to the process that has them.
        """
        return x[:, :0]

    def attention(self, core: Core | None) -> Core | None:
        """The core for the slots of this shard, around one for whole rows."""
        return core


def linear(kind: Kind, inputs: int, outputs: int) -> nn.Linear:
    """A projection without bias, in the precision of the model."""
    return nn.Linear(inputs, outputs, bias=False)


def stack(layer: nn.Module, name: str, shape: tuple[int, int, int], parts: int) -> None:
    """Puts the weights of a layer's experts into it, (E, out, in). parts: how many matrices on
    disk each of the E is, one below the other.
    """
    layer.register_parameter(name, nn.Parameter(torch.empty(shape)))


@dataclass(frozen=True)
class Compute:
    """How a model computes; its weights and their names are the same whatever stands here."""

    core: Core | None = None
    """Attention in training (ops/attention.py); None: what suits the device."""
    linear: Callable[[Kind, int, int], nn.Linear] = linear
    """Makes the projection of a kind of layer."""
    stack: Callable[[nn.Module, str, tuple[int, int, int], int], None] = stack
    """Puts the weights of the routed experts into their layer."""
    routed: Callable[[], Routed] = lambda: routed
    """Makes the routed experts' computation of one layer."""
    experts: Callable[[Any], Any] | None = None
    """Makes the experts of a layer of this config; None: all of them, model.moe.Experts."""
    shard: Shard = field(default_factory=Shard)
    recompute: Literal["none", "selective", "full"] = "none"
    """What a decoder layer recomputes in its backward (`train.activation_checkpointing`)."""
    heads: "Compute | None" = None
    """For the layers of prediction heads; None: the same."""


_given = [Compute()]


@contextmanager
def building(compute: Compute) -> Iterator[None]:
    """Layers that are built inside are given this."""
    _given.append(compute)
    try:
        yield
    finally:
        _given.pop()


def given() -> Compute:
    """What a layer that is being built is given."""
    return _given[-1]
