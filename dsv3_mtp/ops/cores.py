"""The attention cores that a run may choose from, and the choice. attention.py says what a core is.

MLA's queries and keys (192 in V3) are wider than its values (128), which not every kernel takes.
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv3_mtp.ops import te_library
from dsv3_mtp.ops.attention import Core, sdpa

# what `auto` tries, by the major compute capability: Hopper, Blackwell
ORDER = {9: ["fa4", "fa3", "sdpa"], 10: ["fa4", "sdpa"]}
MODULES = {"fa4": "flash_attn.cute", "fa3": "flash_attn_interface", "fa2": "flash_attn"}
INSTALL = {
    "fa4": "pip install -e '.[fa4]'",
    "fa3": "build the hopper folder of flash-attention from source",
    "fa2": "pip install -e '.[fa2]' --no-build-isolation",
}


def choose_attention(
    backend: str,
    *,
    heads: int,
    widths: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
    masked: bool,
) -> tuple[Core | None, str]:
    """The kernel to use (None: the model's own on a CPU) and a line that says why.

    Args:
        backend: `attention.backend`.
        widths: of query and key, and of value.
        masked: attention stays inside documents (`data.mask_documents`).

    Raises:
        ValueError: the named backend cannot run here, or not on this.
    """
    if backend != "auto":
        core, reason = _try(backend, heads, widths, dtype, device, masked)
        if reason:
            raise ValueError(
                f"attention.backend: {backend} {reason}; or set attention.backend: auto"
            )
        return core, f"attention: {backend} (attention.backend)"
    if device.type != "cuda":
        return None, "attention: the CPU's own (sdpa without a C compiler)"
    order = ORDER.get(torch.cuda.get_device_capability(device)[0], ["fa2", "sdpa"])
    reasons: list[str] = []
    for name in order:
        core, reason = _try(name, heads, widths, dtype, device, masked)
        if not reason:
            return core, f"attention: {name}" + (f" ({'; '.join(reasons)})" if reasons else "")
        reasons.append(f"{name} {reason}")
    raise AssertionError("sdpa takes everything")


def _try(
    name: str,
    heads: int,
    widths: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
    masked: bool,
) -> tuple[Core | None, str]:
    """(kernel, "") or (None, why not)."""
    if name == "sdpa":
        return sdpa, ""
    if device.type != "cuda":
        return None, "needs a CUDA device"
    if masked and name == "te":
        return None, "keeps no attention inside documents here (data.mask_documents: true)"
    if dtype not in (torch.bfloat16, torch.float16):
        return None, f"needs train.dtype: bfloat16 (got {dtype})"
    sizes = f"(got {widths[0]} and {widths[1]})"
    if name == "fa2" and widths[1] > widths[0]:
        return None, f"pads values to the width of keys, and they are wider {sizes}"
    if max(widths) > 256 or any(width % 8 for width in widths):
        return None, f"needs head widths that are multiples of 8 and at most 256 {sizes}"
    if name == "te":
        module, reason = te_library.load()
        if module is None:
            return None, reason
        core = te_core(module, heads, widths)
    else:
        try:
            package = import_module(MODULES[name])
            functions = package.flash_attn_func, package.flash_attn_varlen_func
        except Exception as error:  # a wheel for another CUDA or torch fails in many ways
            return None, f"cannot be imported ({type(error).__name__}: {error}); {INSTALL[name]}"
        core = FlashCore(*functions, pad_value=name == "fa2")
    reason = probe(core, heads, widths, dtype, device, masked=masked)
    return (None, reason) if reason else (core, "")


def probe(
    core: Core,
    heads: int,
    widths: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
    *,
    masked: bool = False,
) -> str:
    """Why the kernel fails at these widths, forward or backward; "": it runs."""
    try:
        with torch.enable_grad():
            query, key, value = (
                torch.zeros(1, heads, 128, n, dtype=dtype, device=device, requires_grad=True)
                for n in (widths[0], *widths)
            )
            first = torch.zeros(1, 128, dtype=torch.int64, device=device) if masked else None
            out = core(query, key, value, widths[0] ** -0.5, first)
            out.backward(torch.zeros_like(out))
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except Exception as error:
        line = next(iter(str(error).splitlines()), "")
        return f"does not run here ({type(error).__name__}: {line})"
    return ""


class FlashCore:
    """flash-attn's functions, which take (B, T, H, width); version 2 insists on equal widths.

    Documents are sequences of a varlen call: rows and documents lie one after the other.
    """

    def __init__(self, whole: Callable[..., Any], varlen: Callable[..., Any], *, pad_value: bool):
        self.whole, self.varlen, self.pad_value = whole, varlen, pad_value
        # of the micro-batch at hand: all layers are given the same tensor
        self.first: Tensor | None = None
        self.ends, self.longest = torch.empty(0), 0

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float, first: Tensor | None
    ) -> Tensor:
        width = value.shape[-1]
        if self.pad_value:
            value = F.pad(value, (0, query.shape[-1] - width))
        parts = [x.transpose(1, 2) for x in (query, key, value)]  # (B, T, H, width)
        if first is None:
            out = _first(self.whole(*parts, softmax_scale=scale, causal=True))
        else:
            ends, longest = self.sequences(first)
            sizes = {"cu_seqlens_q": ends, "cu_seqlens_k": ends}
            longests = {"max_seqlen_q": longest, "max_seqlen_k": longest}
            flat = [part.flatten(0, 1) for part in parts]  # (B*T, H, width)
            out = _first(self.varlen(*flat, **sizes, **longests, softmax_scale=scale, causal=True))
            out = out.unflatten(0, first.shape)
        return out.transpose(1, 2)[..., :width]

    def sequences(self, first: Tensor) -> tuple[Tensor, int]:
        """Where each document of all rows ends, after a 0, and the length of the longest: the host
        waits for it once in a micro-batch.
        """
        if first is not self.first:
            slots = torch.arange(first.shape[1], device=first.device)
            begins = (first == slots).flatten().nonzero().squeeze(1)
            ends = torch.cat([begins, begins.new_tensor([first.numel()])])
            self.longest = int(ends.diff().max())
            self.first, self.ends = first, ends.to(torch.int32)
        return self.ends, self.longest


def _first(out: Any) -> Tensor:
    """Some versions return the log-sum-exp as well."""
    return out[0] if isinstance(out, tuple) else out


def te_core(module: Any, heads: int, widths: tuple[int, int]) -> Core:
    """te.DotProductAttention, which itself picks cuDNN or a flash-attn. It wants the scale when it
    is built.
    """
    built: dict[float, Any] = {}

    def core(
        query: Tensor, key: Tensor, value: Tensor, scale: float, first: Tensor | None
    ) -> Tensor:
        if scale not in built:
            built[scale] = module.DotProductAttention(
                heads,
                widths,
                softmax_scale=scale,
                attn_mask_type="causal",
                qkv_format="bshd",
                attention_dropout=0.0,
            )
        # (B, T, H * v)
        out = built[scale](*(x.transpose(1, 2).contiguous() for x in (query, key, value)))
        return out.unflatten(-1, (heads, -1)).transpose(1, 2)

    return core
