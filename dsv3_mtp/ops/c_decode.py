"""The C kernels of decoding on a CPU (csrc/decode.c): all layers of a few rows in one call, in
float32 and bfloat16.

For one token torch's operations cost more than what they compute: about 70 of them a layer. In C
the weights are read, once for all rows, and little else happens. Sums are float32, and so is what
lies between the products of a sublayer. A row's result does not depend on the rows beside it, bit
for bit.

Weights are checked when a layer is made, its inputs in every call: raw pointers are followed
without question there.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dsv3_mtp.ops.c import check
from dsv3_mtp.ops.c_library import call, function

# Up to here C is used. At 64 rows it took 0.4 to 0.7 of torch's time (models of 2M and 12M).
ROWS = 64


@dataclass(frozen=True)
class Attention:
    """x + MLA(norm(x)) in the absorbed form.

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

    def sizes(self, dtype: torch.dtype) -> dict[str, int]:
        """As `Router.sizes`."""
        (heads, value, rank), (low, hidden) = self.w_uv.shape, self.down.shape
        query, nope = low - rank - self.rope, self.up.shape[0] // heads - self.rope
        check("down", self.down, (low, hidden), dtype)
        check("up", self.up, (heads * (nope + self.rope), query or hidden), dtype)
        check("w_uv", self.w_uv, (heads, value, rank), dtype)
        check("out", self.out, (hidden, heads * value), dtype)
        check(
            "w_uk",
            self.w_uv if self.w_uk is None else self.w_uk,
            (heads, value, rank) if self.w_uk is None else (heads, rank, nope),
            dtype,
        )
        if min(query, nope) < 0 or self.rope % 2 or (self.w_uk is None and nope != rank):
            raise ValueError(f"rope: {self.rope} does not fit the other sizes")
        named = {"hidden": hidden, "q_rank": query, "rank": rank, "rope": self.rope}
        return named | {"heads": heads, "nope": nope, "value": value}


@dataclass(frozen=True)
class Router:
    """The routed experts of a MoE and how they are chosen (model/moe.py, `Gate`)."""

    router: Tensor  # (E, C)
    bias: Tensor  # (E,) float32
    gate_up: Tensor  # (E, 2F, C)
    down: Tensor  # (E, C, F)
    groups: int
    topk_group: int
    top_k: int
    normalise: bool
    scaling: float

    def sizes(self, hidden: int, dtype: torch.dtype) -> dict[str, int]:
        """The sizes of `layer` in decode.c, once all weights are found to agree with them."""
        experts, _, width = self.down.shape
        check("router", self.router, (experts, hidden), dtype)
        check("bias", self.bias, (experts,), torch.float32)
        check("gate_up", self.gate_up, (experts, 2 * width, hidden), dtype)
        check("down", self.down, (experts, hidden, width), dtype)
        if experts % self.groups or not (
            1 <= self.topk_group <= self.groups
            and 1 <= self.top_k <= self.topk_group * (experts // self.groups)
        ):
            raise ValueError(f"top_k: {self.top_k} of {self.topk_group} of {self.groups} groups")
        named = {"experts": experts, "width": width, "groups": self.groups}
        return named | {
            "topk_group": self.topk_group,
            "top_k": self.top_k,
            "normalise": int(self.normalise),
        }


@dataclass(frozen=True)
class MLP:
    """x + common(norm(x)) + the sum over the chosen experts of gate * expert(norm(x)): a dense
    layer, which has no experts, or a MoE, whose shared experts are the common part.
    """

    gain: Tensor  # (C,) float32: the norm is x / |(x, floor)| * gain
    floor: float
    common: tuple[Tensor, Tensor, Tensor] | None  # gate and up (F', C), down (C, F'); None: nothing
    router: Router | None = None

    def sizes(self, dtype: torch.dtype) -> dict[str, int]:
        """As `Router.sizes`."""
        hidden = len(self.gain)
        check("gain", self.gain, (hidden,), torch.float32)
        sizes = {"groups": 1}
        if self.common is not None:
            gate, up, down = self.common
            check("gate", gate, (len(gate), hidden), dtype)
            check("up", up, (len(gate), hidden), dtype)
            check("down", down, (hidden, len(gate)), dtype)
            sizes["common_width"] = len(gate)
        return sizes if self.router is None else sizes | self.router.sizes(hidden, dtype)


_COMMON = "common_gate", "common_up", "common_down"
_POINTERS = "down", "up", "w_uk", "w_uv", "out", "gain", "bias", "router", "gate_up", "expert_down"
_SIZES = (
    *("hidden", "q_rank", "rank", "rope", "heads", "nope", "value"),
    *("experts", "width", "common_width", "groups", "topk_group", "top_k", "normalise"),
)
_FLOATS = "floor", "q_floor", "kv_floor", "mlp_floor", "scaling"


class _Layer(ctypes.Structure):
    """`layer` of decode.c."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in (*_POINTERS, *_COMMON)),
        *((name, ctypes.c_int64) for name in _SIZES),
        *((name, ctypes.c_float) for name in _FLOATS),
    ]


class Layers:
    """Decoder layers, one after the other, and the norm behind the last one."""

    def __init__(self, layers: Sequence[tuple[Attention, MLP]], gain: Tensor, floor: float):
        """gain: (C,) float32: the norm is x / |(x, floor)| * gain."""
        self.weights, self.gain, self.floor = layers, gain, floor  # kept: C has their addresses
        self.dtype = layers[0][0].down.dtype
        self.structs = (_Layer * len(layers))(*(_struct(*layer, self.dtype) for layer in layers))
        first = self.structs[0]
        self.hidden, self.rope, self.entry = first.hidden, first.rope, first.rank + first.rope
        check("gain", gain, (self.hidden,), torch.float32)
        if any(
            (x.hidden, x.rope, x.rank) != (first.hidden, first.rope, first.rank)
            for x in self.structs
        ):
            raise ValueError("layers: must be of one hidden size, rope and rank")
        self.run = function("decode_layers", self.dtype)

    def __call__(
        self, x: Tensor, caches: Sequence[Tensor], starts: Sequence[int], angles: Tensor
    ) -> Tensor:
        """x: (B*T, C) of slots starts[b].. of each row -> (2 + layers, B*T, C): x, what each layer
        makes of it, and the last one normed.

        caches: of each layer (B, S, R+P); these slots are written, and those before them read.
        angles: (S, 1, P/2, 2).
        """
        batch, slots, count = len(starts), angles.shape[0], len(caches)
        length = x.shape[0] // batch
        check("x", x, (batch * length, self.hidden), self.dtype)
        check("angles", angles, (slots, 1, self.rope // 2, 2), torch.float32)
        for cache in caches:
            check("cache", cache, (batch, slots, self.entry), self.dtype)
        if count != len(self.structs) or min(starts) < 0 or max(starts) + length > slots:
            raise ValueError(
                f"starts: {starts} + {length} must be in 0..{slots}, a cache per layer"
            )
        states = x.new_empty(2 + count, batch * length, self.hidden)
        states[0] = x
        pointers = (ctypes.c_void_p * count)(*(cache.data_ptr() for cache in caches))
        where = ctypes.addressof(self.structs), count, states.data_ptr(), ctypes.addressof(pointers)
        norm = self.gain.data_ptr(), self.floor
        first = (ctypes.c_int64 * batch)(*starts)
        slots_of = angles.data_ptr(), ctypes.addressof(first), batch, length, slots
        self.run(*where, *norm, *slots_of)
        return states


def _struct(attention: Attention, mlp: MLP, dtype: torch.dtype) -> _Layer:
    sizes = attention.sizes(dtype) | mlp.sizes(dtype)
    if len(mlp.gain) != sizes["hidden"]:
        raise ValueError(f"gain: has {len(mlp.gain)} elements, the layer {sizes['hidden']}")
    names = "down", "up", "w_uk", "w_uv", "out"
    tensors = {name: getattr(attention, name) for name in names} | {"gain": mlp.gain}
    floats = dict(zip(("floor", "q_floor", "kv_floor"), attention.floors, strict=True))
    floats["mlp_floor"] = mlp.floor
    if mlp.common is not None:
        tensors |= dict(zip(_COMMON, mlp.common, strict=True))
    if (router := mlp.router) is not None:
        tensors |= {name: getattr(router, name) for name in ("bias", "router", "gate_up")}
        tensors["expert_down"], floats["scaling"] = router.down, router.scaling
    pointers = {name: None if x is None else x.data_ptr() for name, x in tensors.items()}
    return _Layer(**pointers, **sizes, **floats)


def linear(x: Tensor, weight: Tensor, floors: Tensor | None = None) -> Tensor:
    """x: (N, C), weight: (O, C) -> (N, O). floors: (parts,) float32, with which the parts of a row
    are normed first.
    """
    rows, (outputs, width) = x.shape[0], weight.shape
    parts = 0 if floors is None else floors.shape[0]
    check("x", x, (rows, width), weight.dtype)
    check("weight", weight, (outputs, width), weight.dtype)
    if floors is not None:
        check("floors", floors, (parts,), torch.float32)
        if width % parts:
            raise ValueError(f"floors: {parts} parts of {width} columns")
    y = x.new_empty(rows, outputs)
    call("decode_linear", x.dtype, x, floors, parts, weight, y, rows, width, outputs)
    return y
