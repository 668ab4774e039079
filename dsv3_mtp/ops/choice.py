"""Which implementation of an operation runs: this is the one place that decides.

A tensor on a CPU in float32 or bfloat16 goes to the C kernels (c.py), one on a GPU in float32,
bfloat16 or float16 to the Triton kernels (triton_kernels.py). Torch's own operations run in other
types and on other devices, where there is no compiler for the kernels, under torch's compiler, and
inside `plain()`. Both agree to a rounding.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import torch
from torch import Tensor

from dsv3_mtp.ops import c, c_library

_inside_plain = 0
_ON_GPU = (torch.bfloat16, torch.float16, torch.float32)


def kernels(*tensors: Tensor) -> ModuleType | None:
    """The module with kernels for these tensors, `c` or `triton_kernels`; None: torch's."""
    x = tensors[0]
    if _inside_plain or torch.compiler.is_compiling():
        return None
    for other in tensors[1:]:
        if other.dtype != x.dtype or other.device.type != x.device.type:
            return None
    if x.device.type == "cpu":
        return c if c_library.unavailable(x.dtype) is None else None
    return triton()[0] if x.is_cuda and x.dtype in _ON_GPU else None


@contextmanager
def plain() -> Iterator[None]:
    """Inside, torch's operations run, in every thread: for comparisons.

    A backward uses what its forward did, and needs to be inside only where activation checkpointing
    computes whole blocks again.
    """
    global _inside_plain
    _inside_plain += 1
    try:
        yield
    finally:
        _inside_plain -= 1


@functools.cache
def triton() -> tuple[ModuleType | None, str]:
    """(triton_kernels, "") or (None, why not): compiles one of them to see."""
    try:
        from dsv3_mtp.ops import triton_kernels

        gate, up = torch.zeros(2, 1, 8, device="cuda")
        triton_kernels.swiglu(gate, up, None)
    except Exception as error:  # of Triton, its compiler, or the C compiler that its launchers need
        lines = str(error).strip().splitlines() or [""]
        return None, f"{type(error).__name__}: {lines[0]}"
    return triton_kernels, ""


def missing(device: torch.device) -> str | None:
    """Why torch's slower operations run on this device; None: the kernels run."""
    instead = "torch's operations run instead"
    if device.type == "cuda":
        why = triton()[1]
        return f"Triton kernels: none, {instead} ({why})" if why else None
    reasons = filter(None, map(c_library.unavailable, c_library.TYPES))
    return next((f"C kernels: not built, {instead} ({reason})" for reason in reasons), None)


def describe(device: torch.device) -> str:
    """One line: what runs on this device."""
    if device.type == "cuda":
        return missing(device) or "Triton kernels between the products"
    return missing(device) or "C kernels for float32 and bfloat16 on the CPU"
