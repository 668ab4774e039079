"""One step of decoding in one call of C (csrc/step.c): drafts of one module, the trunk, the
verification, in float32 and bfloat16.

What Python does between two calls of C takes three to five times as long as in a loop of its own,
because weights have driven it from the processor's caches. One draft in pieces cost as much time
there as a token of v3_tiny costs C.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dsv3_mtp.ops.c import check
from dsv3_mtp.ops.c_decode import Layers
from dsv3_mtp.ops.c_library import function


class _Model(ctypes.Structure):
    """`model` of step.c."""

    _fields_ = [
        *((n, ctypes.c_void_p) for n in ("trunk", "module", "output", "draft_output", "draft_ids")),
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
    output: Tensor  # (N, C), of the tokens that can be drafted
    ids: Tensor | None  # (N,) which these are; None: all
    normed: bool  # it reads states behind the norm, the trunk's and its own


@dataclass
class Rows:
    """A batch of B rows in decoding."""

    ids: Tensor  # (B, >S) tokens
    last: list[int]  # where the last known token of each row is
    caches: Sequence[Tensor]  # of each layer of the trunk, (B, S, R+P)
    angles: Tensor  # (S, 1, P/2, 2)
    # of the module, where there is one
    ring: Tensor | None = None  # (B, W, C) the trunk's states: slot i is at i % W
    filled: list[int] = field(default_factory=list)  # its slots whose inputs were all known
    module_caches: Sequence[Tensor] = ()


class Step:
    """What a batch says next."""

    def __init__(self, trunk: Layers, output: Tensor, drafting: Drafting | None = None):
        """output: (V, C)."""
        self.trunk, self.dtype, self.module = trunk, trunk.dtype, None
        (vocab, hidden), self.kept = output.shape, (output, drafting)
        check("output", output, (vocab, trunk.hidden), self.dtype)
        self.model = _Model(trunk=trunk.address, output=output.data_ptr(), vocab=vocab)
        if drafting is not None:
            self.module, ids = drafting.module, drafting.ids
            among = vocab if ids is None else len(ids)
            check("draft output", drafting.output, (among, hidden), self.dtype)
            self.model.module = self.module.address
            self.model.draft_output, self.model.among = drafting.output.data_ptr(), among
            self.model.normed = drafting.normed
            if ids is not None:
                check("draft ids", ids, (among,), torch.int64)
                if min(ids) < 0 or max(ids) >= vocab:
                    raise ValueError(f"draft ids: must be in 0..{vocab - 1}")
                self.model.draft_ids = ids.data_ptr()
        self.run = function("decode_step", self.dtype)
        self.known: tuple[list[int], Any, Any] = [], None, None

    def __call__(
        self, rows: Rows, count: int, temperature: float, coins: Tensor | None
    ) -> tuple[list[int], list[list[int]]]:
        """Of each row how many of its `count` drafts stand, and these plus the next token. They
        come into rows.ids, drafts that fell behind them, and the ring and the caches grow.

        coins: (B, 2 count + 1) float64 in [0, 1), None at temperature 0.
        """
        batch, slots, room = len(rows.last), rows.angles.shape[0], rows.ids.shape[1]
        if (temperature == 0) != (coins is None) or temperature < 0:
            raise ValueError(f"coins: are needed at temperature > 0 (got {temperature}) and only")
        if coins is not None:
            check("coins", coins, (batch, 2 * count + 1), torch.float64)
        at = self._rows(rows)
        end = max(rows.last) + count + 1
        if min(rows.last) < 0 or end > min(slots, room - 1) or count < 0:
            raise ValueError(f"last: {rows.last} + {count} drafts do not fit {slots} slots")
        last, filled = (ctypes.c_int64 * batch)(*rows.last), None
        if self.module is not None and rows.ring is not None:
            lags = [m - f for m, f in zip(rows.last, rows.filled, strict=True)]
            beyond = max(rows.filled) + max(lags) > min(slots, room - 1)
            if min(rows.filled) < 0 or beyond or min(lags) < 1 or max(lags) > rows.ring.shape[1]:
                raise ValueError(f"filled: {rows.filled} of {rows.last} do not fit {slots} slots")
            filled = (ctypes.c_int64 * batch)(*rows.filled)
            at.filled = ctypes.addressof(filled)
        elif count:
            raise ValueError(f"count: {count} drafts, and nothing that drafts")
        at.last = ctypes.addressof(last)
        accepted, tokens = (ctypes.c_int64 * batch)(), (ctypes.c_int64 * (batch * (count + 1)))()
        pointer = None if coins is None else coins.data_ptr()
        model, where = ctypes.addressof(self.model), ctypes.addressof(at)
        wrong = self.run(model, where, count, temperature, pointer, accepted, tokens) or 0
        if wrong < 0:
            raise ValueError("logits: are not finite; no token can be drawn from them")
        if wrong:
            raise IndexError(f"ids: {wrong} tokens are not in 0..{self.model.vocab - 1}")
        if filled is not None and count:
            rows.filled = list(filled)
        found = [tokens[b * (count + 1) : b * (count + 1) + accepted[b] + 1] for b in range(batch)]
        return list(accepted), found

    def _rows(self, rows: Rows) -> _Rows:
        """`batch` of step.c. Checked where its tensors are not those of the call before."""
        tensors = [rows.ids, rows.angles, *rows.caches, *rows.module_caches]
        tensors += [] if rows.ring is None else [rows.ring]
        ids = [len(rows.last), *map(id, tensors)]
        if ids == self.known[0]:
            return self.known[1]
        batch, slots = len(rows.last), rows.angles.shape[0]
        check("ids", rows.ids, (batch, rows.ids.shape[1]), torch.int64)
        at = _Rows(ids=rows.ids.data_ptr(), angles=rows.angles.data_ptr())
        at.batch, at.ids_stride, at.slots = batch, rows.ids.shape[1], slots
        pointers = self.trunk.pointers(rows.caches, rows.angles, batch)
        at.caches, kept = ctypes.addressof(pointers), [pointers]
        if self.module is not None:
            assert rows.ring is not None
            width, hidden = rows.ring.shape[1], self.trunk.hidden
            check("ring", rows.ring, (batch, width, hidden), self.dtype)
            pointers = self.module.pointers(rows.module_caches, rows.angles, batch)
            at.ring, at.ring_width = rows.ring.data_ptr(), width
            at.module_caches = ctypes.addressof(pointers)
            kept.append(pointers)
        self.known = ids, at, (tensors, kept)
        return at
