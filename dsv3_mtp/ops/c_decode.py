"""The C kernels of decoding on a CPU (csrc/decode.c): a sublayer of few rows in one call, in float32
and bfloat16.

For one token torch's operations cost more than what they compute: 70 calls a layer. In C the weights
are read, once for all rows, and little else happens. Sums are float32, and so is what lies between
the products. A row's result does not depend on the rows beside it, bit for bit.

Weights are checked when a sublayer is made, its inputs in every call.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dsv3_mtp.ops.c import check
from dsv3_mtp.ops.c_library import call

ROWS = 16  # up to here a product costs what reading its weights costs, and torch's own cost more


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x: (N, C), weight: (O, C) -> (N, O)."""
    check("x", x, (len(x), weight.shape[1]), weight.dtype)
    check("weight", weight, tuple(weight.shape), weight.dtype)
    y = x.new_empty(len(x), len(weight))
    call("decode_linear", x.dtype, x, weight, y, *x.shape, len(weight))
    return y


@dataclass(frozen=True)
class Attention:
    """x + MLA(norm(x)) in the absorbed form, of T consecutive slots of each row of a cache.

    The norms' weights and the softmax scale have gone into the projections behind them; `floors`
    are sqrt(size * eps) of the norms of x, of the query's latent and of the key's.
    """

    down: Tensor  # (q + R + P, C); q = 0 without query compression
    up: Tensor  # (H (nope + P), q or C); where W_UK is in it, nope is R
    w_uk: Tensor | None  # (H, R, nope); None: it is in `up`
    w_uv: Tensor  # (H, v, R)
    out: Tensor  # (C, H v)
    rope: int
    floors: tuple[float, float, float]

    def __post_init__(self) -> None:
        dtype, (heads, value, rank) = self.down.dtype, self.w_uv.shape
        low, hidden = self.down.shape
        query, nope = low - rank - self.rope, self.up.shape[0] // heads - self.rope
        check("down", self.down, (low, hidden), dtype)
        check("up", self.up, (heads * (nope + self.rope), query or hidden), dtype)
        check("w_uv", self.w_uv, (heads, value, rank), dtype)
        check("out", self.out, (hidden, heads * value), dtype)
        if self.w_uk is not None:
            check("w_uk", self.w_uk, (heads, rank, nope), dtype)
        elif nope != rank:
            raise ValueError(f"up: without w_uk its heads must have {rank} columns (got {nope})")
        sizes = hidden, query, rank, self.rope, heads, nope, value
        object.__setattr__(self, "sizes", sizes)

    def __call__(
        self, x: Tensor, cache: Tensor, angles: Tensor, starts: Sequence[int], first: Tensor
    ) -> Tensor:
        """x: (B*T, C) of slots starts[b]..; cache: (B, S, R+P), where these slots are written, and
        those before them are read; angles: (S, 1, P/2, 2); first: (B,) int64, `starts` -> (B*T, C).
        """
        hidden, _, rank, rope, *_ = self.sizes  # type: ignore[attr-defined]
        (batch, slots, _), length = cache.shape, len(x) // len(starts)
        check("x", x, (batch * length, hidden), self.down.dtype)
        check("cache", cache, (batch, slots, rank + rope), self.down.dtype)
        check("angles", angles, (slots, 1, rope // 2, 2), torch.float32)
        check("first", first, (batch,), torch.int64)
        if min(starts) < 0 or max(starts) + length > slots:
            raise ValueError(f"starts: {starts} + {length} slots are not all in 0..{slots - 1}")
        y = torch.empty_like(x)
        weights = self.down, self.up, self.w_uk, self.w_uv, self.out
        sizes = batch, length, slots, *self.sizes  # type: ignore[attr-defined]
        call("decode_attention", x.dtype, x, *weights, angles, first, cache, y, *sizes, *self.floors)
        return y


@dataclass(frozen=True)
class MLP:
    """x + common(norm(x)) + the sum over the chosen experts of gate * expert(norm(x)): a dense layer,
    which has no experts, or a MoE, whose shared experts are the common part.
    """

    gain: Tensor  # (C,) float32: the norm is x / |(x, floor)| * gain
    floor: float
    common: tuple[Tensor, Tensor, Tensor] | None  # gate and up (F', C), down (C, F'); None: nothing
    router: "Router | None" = None

    def __post_init__(self) -> None:
        hidden, weights = len(self.gain), self.common or ()
        check("gain", self.gain, (hidden,), torch.float32)
        if self.common is not None:
            gate, up, down = self.common
            width, dtype = len(gate), gate.dtype
            check("gate", gate, (width, hidden), dtype)
            check("up", up, (width, hidden), dtype)
            check("down", down, (hidden, width), dtype)
        if self.router is not None:
            self.router.check(hidden)
            weights = (self.router.gate_up, *weights)
        if len({weight.dtype for weight in weights}) != 1:
            raise ValueError("weights: must be of one type")
        object.__setattr__(self, "dtype", weights[0].dtype)

    def __call__(self, x: Tensor) -> Tensor:
        """(N, C) -> (N, C)"""
        check("x", x, (len(x), len(self.gain)), self.dtype)  # type: ignore[attr-defined]
        y, router = torch.empty_like(x), self.router
        common = self.common or (None, None, None)
        if router is None:
            routed, sizes, how = (None, None, None, None), (0, 0), (1, 1, 0, 0, 1.0)
        else:
            routed = router.weight, router.bias, router.gate_up, router.down
            sizes, how = (len(router.down), router.down.shape[2]), router.how
        width = 0 if common[0] is None else len(common[0])
        pointers = x, self.gain, *routed, *common, y
        call("decode_mlp", x.dtype, *pointers, *x.shape, *sizes, width, *how, self.floor)
        return y


@dataclass(frozen=True)
class Router:
    """The routed experts of a MoE and how they are chosen (model/moe.py, `Gate`)."""

    weight: Tensor  # (E, C)
    bias: Tensor  # (E,) float32
    gate_up: Tensor  # (E, 2F, C)
    down: Tensor  # (E, C, F)
    # n_group, topk_group, num_experts_per_tok, norm_topk_prob, routed_scaling_factor
    how: tuple[int, int, int, bool, float]

    def check(self, hidden: int) -> None:
        dtype, (experts, _, width) = self.down.dtype, self.down.shape
        check("weight", self.weight, (experts, hidden), dtype)
        check("bias", self.bias, (experts,), torch.float32)
        check("gate_up", self.gate_up, (experts, 2 * width, hidden), dtype)
        check("down", self.down, (experts, hidden, width), dtype)
        groups, kept, chosen = self.how[:3]
        size = experts // groups
        if experts % groups or not 1 <= kept <= groups or not 1 <= chosen <= kept * size:
            raise ValueError(f"how: {chosen} experts of {kept} of {groups} groups of {size}")
