"""What decoding remembers: latents per layer and slot, and hidden states of the last few slots."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dsv3_mtp.model.causal_lm import DeepseekV3MTP
from dsv3_mtp.model.layers import rotary_angles


class Window(NamedTuple):
    """The slots that one cached forward computes, the same for all layers. Slot and position are
    one number.

    A row's window is T consecutive slots; rows may start at different ones. What lies behind a
    window in the cache is masked, so that forgetting slots (a rejected draft) is no more than
    writing over them.
    """

    shape: tuple[int, int]  # (B, T)
    write: tuple[Any, Any]  # index of the window's slots in a cache (B, S, .)
    end: int  # slots 0..end-1 of the cache are read
    rotation: Tensor  # (B*T, 1, P/2, 2): cosine and sine at the window's positions
    mask: Tensor | None  # (1 or B, 1, T*H, end) additive; None: every slot is visible
    asked: Tensor | None = None  # which rows of B*T the last layer ends with; None: all


class FewSlots(NamedTuple):
    """A window of few slots on a CPU, as its C kernels read it (ops/c_decode.py): what a slot may
    see needs no mask there.
    """

    shape: tuple[int, int]  # (B, T)
    starts: Sequence[int]  # each row's first slot
    angles: Tensor  # (S, 1, P/2, 2): cosine and sine of every slot
    asked: Sequence[int] | None = None  # as in `Window`, in ascending order


class CacheSlots:
    """Makes the windows of a model: where each row's new slots lie, their rotary angles, what they
    may see.
    """

    def __init__(self, model: DeepseekV3MTP, slots: int):
        """slots: size S of every cache, at least the highest slot of any window + 1."""
        weight = model.lm_head.weight
        self.slots, self.heads, self.device = slots, model.config.num_attention_heads, weight.device
        self.dtype = weight.dtype
        # (S, P/2) each
        cos, sin = rotary_angles(model.config, torch.arange(slots, device=self.device))
        self.rotation = torch.stack([cos, sin], dim=-1).unsqueeze(1)  # (S, 1, P/2, 2)
        self.width = model.config.kv_lora_rank + model.config.qk_rope_head_dim  # R+P
        self.arange = torch.arange(slots, device=self.device)

    def caches(self, layers: int, rows: int) -> list[Tensor]:
        """(B, S, R+P) for each layer, zero: a slot that was never written must not be NaN where it
        is masked.

        Not one tensor for all of them: compiled code would copy it whole for every layer that
            writes to it.
        """
        shape = rows, self.slots, self.width
        return [torch.zeros(shape, dtype=self.dtype, device=self.device) for _ in range(layers)]

    def few(
        self, starts: Sequence[int], length: int, asked: Sequence[int] | None = None
    ) -> FewSlots:
        """`window` for the C kernels."""
        return FewSlots((len(starts), length), starts, self.rotation, asked)

    def window(
        self, starts: Sequence[int], length: int, asked: Sequence[int] | None = None
    ) -> Window:
        """Row b computes slots starts[b]..starts[b]+length-1 and sees slots 0..its own.

        asked: the last layer's output is needed of these rows of B*T alone, of the others what the
        caches hold of them; None: of all.
        """
        rows, start, end = len(starts), starts[0], max(starts) + length
        write: tuple[Any, Any]
        if min(starts) == max(starts):
            positions = self.arange[start:end]  # (T,), the same for all rows
            rotation = self.rotation[start:end]
            write = (slice(None), slice(start, end))
            if rows > 1:
                rotation = rotation.repeat(rows, 1, 1, 1)
        else:
            first = torch.tensor(starts, device=self.device)
            positions = first[:, None] + self.arange[:length]  # (B, T)
            rotation = self.rotation[positions.flatten()]
            write = (torch.arange(rows, device=self.device)[:, None], positions)
        mask = None
        if length > 1 or positions.ndim == 2:
            hidden = self.arange[:end] > positions[..., None]  # (T, end) or (B, T, end)
            mask = torch.zeros(hidden.shape, dtype=self.dtype, device=self.device).masked_fill_(
                hidden, float("-inf")
            )
            mask = mask.repeat_interleave(self.heads, dim=-2).view(-1, 1, length * self.heads, end)
        needed = None if asked is None else torch.tensor(asked, device=self.device)
        return Window((rows, length), write, end, rotation, mask, needed)


def span(ids: Tensor, starts: Sequence[int], length: int) -> Tensor:
    """(B, >S) tokens -> (B, length): those at starts[b]..starts[b]+length-1 of row b."""
    if min(starts) == max(starts):
        return ids[:, starts[0] : starts[0] + length]
    first = torch.tensor(starts, device=ids.device)[:, None]
    return ids.gather(1, first + torch.arange(length, device=ids.device))


def put(ids: Tensor, slots: Sequence[int], tokens: Tensor) -> None:
    """tokens (B,) become those at slots[b] of row b of ids (B, >S)."""
    if min(slots) == max(slots):
        ids[:, slots[0]] = tokens
    else:
        ids[torch.arange(len(slots), device=ids.device), torch.tensor(slots).to(ids.device)] = (
            tokens
        )


class Ring:
    """Hidden states of each row's last W slots. Writing slot i forgets slot i - W.

    A drafting module runs a few slots behind the trunk (it needs tokens that are not known yet), so
    the states that it reads have to wait here; a full-length buffer would cost more than the latent
    cache.
    """

    def __init__(self, rows: int, width: int, like: Tensor):
        """like: (C, .) a weight of the model."""
        # (B, W, C)
        self.states = torch.zeros(rows, width, like.shape[-1], dtype=like.dtype, device=like.device)

    def read(self, starts: Sequence[int], length: int) -> Tensor:
        """(B, length, C): slots starts[b]..starts[b]+length-1."""
        return self.states[self._index(starts, length)]

    def write(self, starts: Sequence[int], states: Tensor) -> None:
        """states: (B, T, C) of slots starts[b]..starts[b]+T-1, T <= W."""
        self.states[self._index(starts, states.shape[1])] = states

    def _index(self, starts: Sequence[int], length: int):
        width, device = self.states.shape[1], self.states.device
        if min(starts) == max(starts) and starts[0] % width + length <= width:
            start = starts[0] % width
            return slice(None), slice(start, start + length)
        # (B, T)
        slots = torch.tensor(starts, device=device)[:, None] + torch.arange(length, device=device)
        return torch.arange(len(starts), device=device)[:, None], slots % width
