"""One step of decoding in one call of C (csrc/step.c): drafts of one module, the trunk, the
verification, in float32 and bfloat16.

What Python does between two calls of C takes three to five times as long as in a loop of its own,
because weights have driven it from the processor's caches. One draft in pieces cost as much time
there as a token of v3_tiny costs C.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dsv3_mtp.ops.c import check
from dsv3_mtp.ops.c_decode import NOT_FINITE, Layers, Linear
from dsv3_mtp.ops.c_layer import Matrix
from dsv3_mtp.ops.c_library import function


class _Model(ctypes.Structure):
    """`model` of step.c."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("trunk", "module")),
        *((name, Matrix) for name in ("output", "draft_output")),
        ("draft_ids", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("vocab", "among", "normed")),
    ]


class _Rows(ctypes.Structure):
    """`batch` of step.c."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("ids", "last", "filled", "ring", "caches")),
        *((name, ctypes.c_void_p) for name in ("module_caches", "angles")),
        *((name, ctypes.c_int64) for name in ("batch", "ids_stride", "ring_width", "slots")),
    ]


@dataclass(frozen=True)
class Drafting:
    """The module that drafts: each draft after the first reads its own state of the one before."""

    module: Layers
    output: Linear  # (N, C), of the tokens that can be drafted
    ids: Tensor | None  # (N,) which these are; None: all
    normed: bool  # it reads states behind the norm, the trunk's and its own


class Rows:
    """The tensors of a batch of B rows in decoding, for as long as they are the same ones."""

    def __init__(
        self,
        step: "Step",
        ids: Tensor,
        caches: Sequence[Tensor],
        angles: Tensor,
        ring: Tensor | None = None,
        module_caches: Sequence[Tensor] = (),
    ):
        """ids: (B, >S) tokens; caches: of each layer of the trunk, (B, S, R+P); angles: (S, 1,
        P/2, 2). Where a module drafts, ring: (B, W, C) the trunk's states, slot i at i % W; and
        the module's caches.
        """
        (self.batch, room), slots = ids.shape, angles.shape[0]
        check("ids", ids, (self.batch, room), torch.int64)
        pointers = [step.trunk.pointers(caches, angles, self.batch)]
        self.c = _Rows(ids=ids.data_ptr(), angles=angles.data_ptr(), batch=self.batch)
        self.c.ids_stride, self.c.slots = room, slots
        self.c.caches = ctypes.addressof(pointers[0])
        if step.module is not None:
            if ring is None:
                raise ValueError("ring: is needed where a module drafts")
            self.c.ring_width = ring.shape[1]
            check("ring", ring, (self.batch, ring.shape[1], step.trunk.hidden), step.dtype)
            pointers.append(step.module.pointers(module_caches, angles, self.batch))
            self.c.ring = ring.data_ptr()
            self.c.module_caches = ctypes.addressof(pointers[1])
        self.last, self.filled = ((ctypes.c_int64 * self.batch)() for _ in range(2))
        self.c.last, self.c.filled = (ctypes.addressof(x) for x in (self.last, self.filled))
        self.address = ctypes.addressof(self.c)
        self.kept = ids, caches, angles, ring, module_caches, pointers  # C has their addresses


class Step:
    """What a batch says next."""

    def __init__(self, trunk: Layers, output: Linear, drafting: Drafting | None = None):
        """output: (V, C)."""
        self.trunk, self.dtype, self.module = trunk, trunk.dtype, None
        vocab, self.kept = output.shape[0], (output, drafting)
        self._check("output", output, vocab)
        self.model = _Model(trunk=trunk.address, output=output.weight.c, vocab=vocab)
        if drafting is not None:
            self.module, ids = drafting.module, drafting.ids
            among = vocab if ids is None else len(ids)
            self._check("draft output", drafting.output, among)
            self.model.module = self.module.address
            self.model.draft_output, self.model.among = drafting.output.weight.c, among
            self.model.normed = drafting.normed
            if ids is not None:
                check("draft ids", ids, (among,), torch.int64)
                lowest, highest = ids.aminmax()  # Python's min would take a call for each id
                if lowest < 0 or highest >= vocab:
                    raise ValueError(f"draft ids: must be in 0..{vocab - 1}")
                self.model.draft_ids = ids.data_ptr()
        self.address, self.run = ctypes.addressof(self.model), function("decode_step", self.dtype)

    def _check(self, name: str, output: Linear, count: int) -> None:
        expected = (count, self.trunk.hidden), self.dtype
        if (tuple(output.shape), output.dtype) != expected:
            raise ValueError(f"{name}: must be {expected} (got {output.shape}, {output.dtype})")

    def __call__(
        self,
        rows: Rows,
        last: list[int],
        filled: list[int],
        count: int,
        temperature: float,
        coins: Tensor | None,
    ) -> tuple[list[int], list[list[int]]]:
        """Of each row how many of its `count` drafts stand, and these plus the next token. They
        come into ids, and behind them drafts that fell; the ring and the caches grow.

        last: where the last known token of each row is; filled: slots of the module whose inputs
        were all known, brought up to date; coins: (B, 2 count + 1) float64 in [0, 1), None at
        temperature 0.
        """
        batch = rows.batch
        if (temperature == 0) != (coins is None) or temperature < 0:
            raise ValueError(f"coins: are needed at temperature > 0 (got {temperature}) and only")
        if coins is not None:
            check("coins", coins, (batch, 2 * count + 1), torch.float64)
        if count < 0 or (count and self.module is None):
            raise ValueError(f"count: {count} drafts, of nothing that drafts")
        places: Any = last, filled
        rows.last[:] = places[0]
        if count:
            rows.filled[:] = places[1]
        accepted, tokens = (ctypes.c_int64 * batch)(), (ctypes.c_int64 * (batch * (count + 1)))()
        pointer = None if coins is None else coins.data_ptr()
        where = self.address, rows.address, count
        if wrong := self.run(*where, temperature, pointer, accepted, tokens):
            if wrong == -2:
                raise ValueError(f"last, filled: {last}, {filled} + {count} do not fit the caches")
            if wrong < 0:
                raise ValueError(NOT_FINITE)
            raise IndexError(f"ids: {wrong} tokens are not in 0..{self.model.vocab - 1}")
        if count:
            filled[:] = rows.filled
        starts = range(0, batch * (count + 1), count + 1)
        stand = list(accepted)
        return stand, [tokens[at : at + k + 1] for at, k in zip(starts, stand, strict=True)]
