"""The C kernels of decoding on a CPU (csrc/decode.c): all layers of a few rows in one call, in
float32 and bfloat16.

For one token torch's operations cost more than what they compute: about 70 of them a layer. In C
the weights are read, once for all rows, and little else happens. Sums are float32, and so is what
lies between the products of a sublayer; where the processor multiplies bfloat16 itself, what a
product reads is rounded to it. A row's result does not depend on the rows beside it, bit for bit.

Weights are checked when a layer is made, its inputs in every call, caches when they are others
than before: raw pointers are followed without question there.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from dsv3_mtp.ops.c import check
from dsv3_mtp.ops.c_layer import MLP, Attention, Matrix, Struct, Weight, struct
from dsv3_mtp.ops.c_library import call, function

# Up to here C is used. At 64 rows it took 0.4 to 0.7 of torch's time (models of 2M and 12M).
ROWS = 64
NOT_FINITE = "logits: are not finite; no token can be drawn from them"


class _Stack(ctypes.Structure):
    """`stack` of decode.c."""

    _fields_ = [
        ("table", ctypes.c_void_p),
        ("merge", Matrix),
        *((name, ctypes.c_void_p) for name in ("floors", "gain", "layers")),
        *((name, ctypes.c_int64) for name in ("vocab", "parts", "count")),
        ("norm_floor", ctypes.c_float),
    ]


@dataclass(frozen=True)
class Reads:
    """What the first layer reads: the embedding of tokens, given states, or both."""

    table: Tensor | None = None  # (V, C); None: no tokens
    # (C, parts C) of the parts side by side, embedding first, each normed with a floor of
    # floors (parts,) float32; None: what is read is one part, and goes in as it is
    merge: tuple[Tensor, Tensor] | None = None

    def pointers(self, hidden: int, dtype: torch.dtype) -> dict[str, int]:
        """The members of `stack` in decode.c, once they are found to agree."""
        found: dict[str, int] = {}
        if self.table is not None:
            check("table", self.table, (len(self.table), hidden), dtype)
            found |= {"table": self.table.data_ptr(), "vocab": len(self.table)}
        if self.merge is not None:
            weight, floors = self.merge
            parts = len(floors)
            check("merge", weight, (hidden, parts * hidden), dtype)
            check("floors", floors, (parts,), torch.float32)
            if parts != 1 + (self.table is not None):
                raise ValueError(f"merge: {parts} parts, of given states and perhaps tokens")
            found |= {"floors": floors.data_ptr(), "parts": parts}
        return found


class Layers:
    """Decoder layers, one after the other, what the first one reads, and the norm behind the last.

    A call takes microseconds beside the 100 to 200 that C computes for a token of v3_tiny, so that
    what does not change from one call to the next is checked once.
    """

    def __init__(
        self,
        layers: Sequence[tuple[Attention, MLP]],
        gain: Tensor,
        floor: float,
        reads: Reads | None = None,
        int8: bool = False,
    ):
        """gain: (C,) float32: the norm is x / |(x, floor)| * gain. int8: the products' weights are
        read as int8 with a scale for each row, and so is what they are multiplied with.
        """
        self.reads = reads or Reads()
        self.dtype = layers[0][0].down.dtype
        structs, weights = zip(*(struct(*x, self.dtype, int8) for x in layers), strict=True)
        merge = Weight(None if self.reads.merge is None else self.reads.merge[0], int8)
        self.kept = layers, gain, weights, merge  # C has their addresses
        self.structs = (Struct * len(layers))(*structs)
        first = self.structs[0]
        self.hidden, self.rope, self.entry = first.hidden, first.rope, first.rank + first.rope
        check("gain", gain, (self.hidden,), torch.float32)
        if any(
            (x.hidden, x.rope, x.rank) != (first.hidden, first.rope, first.rank)
            for x in self.structs
        ):
            raise ValueError("layers: must be of one hidden size, rope and rank")
        pointers = self.reads.pointers(self.hidden, self.dtype)
        self.stack = _Stack(
            merge=merge.c,
            gain=gain.data_ptr(),
            norm_floor=floor,
            layers=ctypes.addressof(self.structs),
            count=len(layers),
            **pointers,
        )
        self.address, self.run = ctypes.addressof(self.stack), function("decode_layers", self.dtype)
        self.merges, self.takes_tokens = self.reads.merge is not None, "table" in pointers
        self.known: tuple[list[int], Any, Any] = [], None, None

    def in_int8(self) -> "Layers":
        """The same layers, which read less and compute less exactly."""
        layers, gain, _, _ = self.kept
        return Layers(layers, gain, self.stack.norm_floor, self.reads, int8=True)

    def __call__(
        self,
        given: Tensor | None,
        tokens: Tensor | None,
        caches: Sequence[Tensor],
        starts: Sequence[int],
        angles: Tensor,
        asked: Sequence[int] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Slots starts[b].. of each row -> (layers, B*T, C), what each layer reads, and (2, N, C),
        the output of the last one and the same normed, of the N rows `asked` (None: all B*T).

        given: (B*T, C), or None where tokens alone are read; tokens: (B, T) int64, rows possibly
        far apart, or None; caches: of each layer (B, S, R+P): these slots are written, and those
        before them read; angles: (S, 1, P/2, 2); asked: which rows of B*T, in ascending order.
        """
        batch, slots = len(starts), angles.shape[0]
        rows = self._rows(given, tokens)
        length = rows // batch
        if min(starts) < 0 or max(starts) + length > slots or length * batch != rows:
            raise ValueError(f"starts: {starts} + {length} of {rows} rows must be in 0..{slots}")
        pointers = self.pointers(caches, angles, batch)
        x: Any = tokens if given is None else given
        states = torch.empty(len(caches), rows, self.hidden, dtype=self.dtype)
        wanted = range(rows) if asked is None else asked
        out = torch.empty(2, len(wanted), self.hidden, dtype=self.dtype)
        if asked is not None and not all(a < b for a, b in pairwise((-1, *asked, rows))):
            raise ValueError(f"asked: {asked} must ascend from 0 on, below {rows}")
        first = (ctypes.c_int64 * batch)(*starts)
        outside = self.run(
            self.address,
            None if tokens is None else tokens.data_ptr(),
            0 if tokens is None else tokens.stride(0),
            None if given is None else given.data_ptr(),
            states.data_ptr(),
            out.data_ptr(),
            pointers,
            angles.data_ptr(),
            first,
            batch,
            length,
            slots,
            (ctypes.c_int64 * len(wanted))(*wanted),
            len(wanted),
        )
        if outside:
            raise IndexError(f"tokens: {outside} of {x.shape} are not in 0..{self.stack.vocab - 1}")
        return states, out

    def _rows(self, given: Tensor | None, tokens: Tensor | None) -> int:
        """How many rows are computed, once what is read is found to be that."""
        if (tokens is not None) != self.takes_tokens or (given is not None) != (
            self.merges or not self.takes_tokens
        ):
            raise ValueError("given, tokens: must be what `reads` says")
        if tokens is None:
            assert given is not None
            rows = given.shape[0]
        else:
            rows = tokens.numel()
            if tokens.ndim != 2 or tokens.stride(1) != 1 or tokens.dtype != torch.int64:
                raise ValueError(
                    f"tokens: must be int64 (B, T) with contiguous rows (got {tokens})"
                )
        if given is not None:
            check("given", given, (rows, self.hidden), self.dtype)
        return rows

    def pointers(self, caches: Sequence[Tensor], angles: Tensor, batch: int) -> Any:
        """The caches' addresses. Checked where they are not those of the call before."""
        ids = [batch, id(angles), *map(id, caches)]
        if ids != self.known[0]:
            slots = angles.shape[0]
            check("angles", angles, (slots, 1, self.rope // 2, 2), torch.float32)
            for cache in caches:
                check("cache", cache, (batch, slots, self.entry), self.dtype)
            if len(caches) != len(self.structs):
                raise ValueError(f"caches: {len(caches)} of {len(self.structs)} layers")
            pointers = (ctypes.c_void_p * len(caches))(*(cache.data_ptr() for cache in caches))
            # the tensors are kept: no other one gets their ids
            self.known = ids, pointers, (angles, *caches)
        return self.known[1]


class Linear:
    """x: (N, C) -> x @ weight^T (N, O)."""

    def __init__(self, weight: Tensor, int8: bool = False):
        """weight: (O, C); int8: as in `Layers`."""
        self.shape, self.dtype = weight.shape, weight.dtype
        check("weight", weight, self.shape, self.dtype)
        self.weight, self.run = Weight(weight, int8), function("decode_linear", self.dtype)

    def __call__(self, x: Tensor) -> Tensor:
        rows, (outputs, width) = x.shape[0], self.shape
        check("x", x, (rows, width), self.dtype)
        y = torch.empty(rows, outputs, dtype=x.dtype)
        weight = ctypes.byref(self.weight.c)
        self.run(x.data_ptr(), weight, y.data_ptr(), rows, width, outputs)
        return y


def largest(x: Tensor) -> Tensor:
    """x: (N, V) -> (N,), where the largest number of a row is, the first of them.

    Raises:
        ValueError: a row has nan, or its largest is not finite.
    """
    check("x", x, (x.shape[0], x.shape[-1]), x.dtype)
    y = torch.empty(x.shape[0], dtype=torch.int64)
    if call("decode_largest", x.dtype, x, y, *x.shape):
        raise ValueError(NOT_FINITE)
    return y
