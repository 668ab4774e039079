"""Whether the Triton kernels of triton_kernels.py are used: on a GPU, in bfloat16, float16 and
float32.

Off until `enable()`, which the trainer calls. Where Triton is missing or cannot compile, on other
devices, in other dtypes and under torch's compiler, the model's own torch operations run; the two
agree to a rounding.
"""

from typing import Any

import torch
from torch import Tensor

kernels: Any = None  # the module triton_kernels, which CPUs cannot import, once it is enabled


def enable() -> str:
    """Compiles a kernel to see whether that can be done here, and uses them from now on. Returns
    one line on it.
    """
    global kernels
    try:
        from dsv3_mtp.ops import triton_kernels

        triton_kernels.silu_mul(*torch.zeros(2, 8, device="cuda"))
    except (
        Exception
    ) as error:  # of Triton, its compiler, or the system's C compiler, which it needs for launchers
        lines = str(error).strip().splitlines() or [""]
        return (
            "Triton kernels: none, torch's operations run "
            f"instead ({type(error).__name__}: {lines[0]})"
        )
    kernels = triton_kernels
    return "Triton kernels between the products"


def disable() -> None:
    """Back to torch's operations."""
    global kernels
    kernels = None


def usable(x: Tensor) -> bool:
    """Whether the kernels are on and take this tensor."""
    on = kernels is not None and x.is_cuda and not torch.compiler.is_compiling()
    return on and x.dtype in (torch.bfloat16, torch.float16, torch.float32)
