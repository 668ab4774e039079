"""What SGLang's CPU path calls of its package sgl_kernel, in plain torch, for chains of drafts.

The package for CPUs is on no index: it is built from SGLang's sources. `install` puts this module
in its place, for this process, before sglang is imported; SGLang's own code is all the rest. The
names, the order of the arguments and what is written where are those of its callers (0.5.23).
"""

import importlib.machinery
import sys
import types
from collections.abc import Iterator
from typing import Any

import torch
import transformers.utils
from torch import Tensor


def install() -> None:
    package = empty_module("sgl_kernel")
    for function in KERNELS:
        setattr(package, function.__name__, function)
    torch.ops.sgl_kernel.extend_attention_cpu = extend_attention_cpu
    torch.ops.sgl_kernel.decode_attention_cpu = decode_attention_cpu
    # DeepSeek's draft model waits for a GPU when it takes over embedding and output head
    torch.cuda.synchronize = lambda device=None: None
    # SGLang imports it for models that see; transformers has noted by now that it is not there
    if not transformers.utils.is_torchvision_available():
        for name in ("", ".transforms", ".transforms.functional"):
            empty_module("torchvision" + name)


def empty_module(name: str) -> types.ModuleType:
    """A module, also for those who look for its folder, whose names can be imported."""
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    module.__path__ = []
    module.__getattr__ = absent  # type: ignore[method-assign]
    sys.modules[name] = module
    return module


def absent(name: str) -> Any:
    """Stands for what is imported but not called on this path."""
    if name.startswith("__"):
        raise AttributeError(name)

    def refuse(*_: Any, **__: Any) -> None:
        raise NotImplementedError(f"{name} has no stand-in")

    return refuse


def attend(queries: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Tensor:
    """Attention of the last tokens of a sequence, (tokens, heads, width), to all of it."""
    each = queries.shape[1] // keys.shape[1]
    keys, values = (x.repeat_interleave(each, dim=1) for x in (keys, values))
    scores = torch.einsum("qhd,khd->hqk", queries, keys) * scaling
    new, length = scores.shape[1:]
    later = torch.ones(new, length, dtype=torch.bool).triu(length - new + 1)
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(later, -torch.inf).softmax(-1), values)


def extend_attention_cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    key_scale: float,
    value_scale: float,
    slots: Tensor,
    rows: Tensor,
    lengths: Tensor,
    new_lengths: Tensor,
    starts: Tensor,
    longest: int,
    scaling: float,
    *others: Any,
) -> None:
    """New tokens with keys and values at hand; what came before them is in the cache."""
    tree_mask, causal = others[-2:]
    assert tree_mask is None and causal, "chains only"
    for row, length, new, start in zip(rows, lengths, new_lengths, starts, strict=True):
        span = slice(start, start + new)
        keys, values = k[span], v[span]
        if length > new:  # the cache may be of another width than the keys of a whole prompt
            before = slots[row, : length - new].long()
            keys = torch.cat([key_cache[before], keys])
            values = torch.cat([value_cache[before], values])
        out[span] = attend(q[span], keys, values, scaling)


def decode_attention_cpu(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    key_scale: float,
    value_scale: float,
    out: Tensor,
    k: Tensor,
    v: Tensor,
    where: Tensor,
    scratch: Tensor,
    slots: Tensor,
    rows: Tensor,
    lengths: Tensor,
    scaling: float,
    *others: Any,
) -> None:
    """One new token of each sequence, which is written to the cache here."""
    key_cache[where], value_cache[where] = k.view(len(q), *key_cache.shape[1:]), v
    for i, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        seen = slots[row, :length].long()
        out[i] = attend(q[i : i + 1], key_cache[seen], value_cache[seen], scaling)[0]


def spans(rows: Tensor, starts: Tensor, ends: Tensor) -> Iterator[tuple[int, slice, slice]]:
    """Of each sequence its row, its slice of that row, and its slice of all of them packed."""
    packed = 0
    for row, start, end in zip(rows.tolist(), starts.tolist(), ends.tolist(), strict=True):
        yield row, slice(start, end), slice(packed, packed + end - start)
        packed += end - start


def assign_req_to_token_pool_cpu(
    rows: Tensor, slots: Tensor, starts: Tensor, ends: Tensor, locations: Tensor, width: int
) -> None:
    for row, span, packed in spans(rows, starts, ends):
        slots[row, span] = locations[packed].to(slots.dtype)


def assign_extend_cache_locs_cpu(
    rows: Tensor, slots: Tensor, starts: Tensor, ends: Tensor, locations: Tensor, width: int
) -> None:
    for row, span, packed in spans(rows, starts, ends):
        locations[packed] = slots[row, span].to(locations.dtype)


def assign_draft_cache_locs_contiguous_cpu(
    rows: Tensor, slots: Tensor, lengths: Tensor, locations: Tensor, width: int, k: int, steps: int
) -> None:
    assign_extend_cache_locs_cpu(rows, slots, lengths, lengths + k * steps, locations, width)


def build_draft_decode_metadata_cpu(
    slots: Tensor, rows: Tensor, lengths: Tensor, k: int, steps: int, width: int
) -> Tensor:
    assert k == 1, "chains only"
    return slots[rows]


def build_tree_kernel_efficient_cpu(
    parents: Tensor,
    chosen: Tensor,
    lengths: Tensor,
    tree_mask: Tensor,
    positions: Tensor,
    index: Tensor,
    next_token: Tensor,
    next_sibling: Tensor,
    k: int,
    *others: Any,
) -> None:
    """A chain; nobody reads its mask."""
    assert k == 1, "chains only"
    count, size = index.shape
    index.copy_(torch.arange(count * size).view(count, size))
    positions.copy_((lengths[:, None] + torch.arange(size)).flatten())
    next_token[:, :-1] = torch.arange(1, size)


def verify_tree_greedy_cpu(
    predicts: Tensor,
    accept_index: Tensor,
    accept_token_num: Tensor,
    candidates: Tensor,
    target_predict: Tensor,
    **tree: Tensor,
) -> None:
    """Drafts stand until the first that is not the main model's token."""
    size = candidates.shape[1]
    for i, (drafts, wanted) in enumerate(zip(candidates, target_predict, strict=True)):
        stood = int((drafts[1:] == wanted[:-1]).int().cumprod(0).sum())
        accept_token_num[i] = stood
        accept_index[i, : stood + 1] = torch.arange(i * size, i * size + stood + 1)
        predicts[i * size : i * size + stood + 1] = wanted[: stood + 1].to(predicts.dtype)


def fill_bonus_tokens_cpu(tokens: Tensor, lengths: Tensor, bonus: Tensor, stride: int) -> None:
    last = torch.arange(len(lengths)) * stride + lengths - 1
    bonus.copy_(tokens.flatten()[last])


def fill_accept_out_cache_loc_cpu(index: Tensor, locations: Tensor, accepted: Tensor) -> None:
    kept = index.flatten()[index.flatten() >= 0].long()
    accepted[: len(kept)] = locations[kept]


KERNELS = (
    assign_req_to_token_pool_cpu,
    assign_extend_cache_locs_cpu,
    assign_draft_cache_locs_contiguous_cpu,
    build_draft_decode_metadata_cpu,
    build_tree_kernel_efficient_cpu,
    verify_tree_greedy_cpu,
    fill_bonus_tokens_cpu,
    fill_accept_out_cache_loc_cpu,
)
