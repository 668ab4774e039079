"""Chains of small operations as one kernel on a GPU, by torch.compile.

    @fused
    def silu_mul(gate, up): ...

Off until `enable()`, which the trainer calls; then calls on CUDA tensors run compiled, all others as they are. Where
nothing can be compiled (no Triton, or no C compiler for its launchers) the run says so and stays with torch's kernels.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_on = False


class fused:
    """A function of tensors, each call of which is one kernel or few; its first argument decides where it runs.

    Compiled once per kind of arguments: the first shape as it is, further ones with sizes left open. Sums inside a
    kernel are in float32 and rounded once, so that it differs from the operations one by one by a rounding.
    """

    def __init__(self, function: Callable[..., Any]):
        self.function = function
        self.compiled: Callable[..., Any] | None = None
        self.__doc__ = function.__doc__

    def __call__(self, *args: Any) -> Any:
        if not usable(args[0]):
            return self.function(*args)
        if self.compiled is None:  # not at import: it loads torch's compiler, for a second
            self.compiled = torch.compile(self.function)
        return self.compiled(*args)


def usable(x: Tensor) -> bool:
    """Whether fused functions of this tensor run compiled."""
    return _on and x.device.type == "cuda" and not torch.compiler.is_compiling()


def enable() -> str:
    """Uses compiled kernels from now on if one can be compiled here. Returns one line on the outcome."""
    global _on
    import torch._dynamo.config

    # Forward, backward and recomputation, and FP8's tiles along rows and columns of every layer, are one kind each.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    try:
        torch.compile(lambda x: x.sigmoid() * x)(torch.zeros(8, device="cuda"))
    except Exception as error:  # of torch's compiler, Triton or the system's C compiler
        lines = str(error).strip().splitlines() or [""]
        return f"fused GPU kernels: none, torch's operations run instead ({type(error).__name__}: {lines[0]})"
    _on = True
    return "fused GPU kernels, by torch.compile"


def disable() -> None:
    """Back to torch's operations."""
    global _on
    _on = False
