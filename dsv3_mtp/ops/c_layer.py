"""A decoder layer as the C kernels of decoding read it (csrc/decode.c, `layer`): its weights,
checked against one another, and the structure that holds their addresses.
"""

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from dsv3_mtp.ops.c import check
from dsv3_mtp.ops.c_library import call

WIDEST = 2**16  # 127 * 255 times that is below 2^31


class Matrix(ctypes.Structure):
    """`matrix` of decode.h."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("at", "scale", "shift")]


class Weight:
    """A weight (O, C), or several (.., O, C), as C reads it: as it is, or in int8 with a scale for
    each output.
    """

    def __init__(self, weight: Tensor | None, int8: bool = False):
        self.kept = () if weight is None else codes(weight) if int8 else (weight,)
        self.c = Matrix(*(x.data_ptr() for x in self.kept))


def codes(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(.., O, C) -> codes, scale and shift as csrc/codes.h arranges them."""
    (outputs, width), (block, deep) = weight.shape[-2:], (16, 4)
    if width > WIDEST:
        raise ValueError(f"int8: sums of {width} products may not fit 32 bits; at most {WIDEST}")
    several = weight.reshape(-1, outputs, width)
    outputs, width = (-(-x // to) * to for x, to in ((outputs, block), (width, deep)))
    written = torch.empty(len(several), outputs * width, dtype=torch.int8)
    scale, shift = torch.empty(2, len(several), outputs)
    for one, *to in zip(several, written, scale, shift, strict=True):
        call("decode_codes", weight.dtype, one, *one.shape, *to)
    return written, scale, shift


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
_MATRICES = "down", "up", "out", "gate_up", "expert_down", *_COMMON
_POINTERS = "w_uk", "w_uv", "router", "gain", "bias"
_SIZES = (
    *("hidden", "q_rank", "rank", "rope", "heads", "nope", "value"),
    *("experts", "width", "common_width", "groups", "topk_group", "top_k", "normalise"),
)
_FLOATS = "floor", "q_floor", "kv_floor", "mlp_floor", "scaling"


class Struct(ctypes.Structure):
    """`layer` of decode.h."""

    _fields_ = [
        *((name, Matrix) for name in _MATRICES),
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_int64) for name in _SIZES),
        *((name, ctypes.c_float) for name in _FLOATS),
    ]


def struct(
    attention: Attention, mlp: MLP, dtype: torch.dtype, int8: bool
) -> tuple[Struct, list[Weight]]:
    """The layer, and what its matrices lie in. int8: all but the router's and the heads' own."""
    sizes = attention.sizes(dtype) | mlp.sizes(dtype)
    if len(mlp.gain) != sizes["hidden"]:
        raise ValueError(f"gain: has {len(mlp.gain)} elements, the layer {sizes['hidden']}")
    tensors = {name: getattr(attention, name) for name in ("down", "up", "w_uk", "w_uv", "out")}
    tensors["gain"] = mlp.gain
    floats = dict(zip(("floor", "q_floor", "kv_floor"), attention.floors, strict=True))
    floats["mlp_floor"] = mlp.floor
    if mlp.common is not None:
        tensors |= dict(zip(_COMMON, mlp.common, strict=True))
    if (router := mlp.router) is not None:
        tensors |= {"bias": router.bias, "router": router.router, "expert_down": router.down}
        tensors["gate_up"] = router.gate_up.unflatten(1, (2, -1))  # two matrices
        floats["scaling"] = router.scaling
    weights = {name: Weight(tensors.get(name), int8) for name in _MATRICES}
    found = ((name, tensors.get(name)) for name in _POINTERS)
    pointers = {name: None if x is None else x.data_ptr() for name, x in found}
    matrices = {name: weight.c for name, weight in weights.items()}
    return Struct(**matrices, **pointers, **sizes, **floats), list(weights.values())
