"""Settings of this process that make training faster, each used only where it is known to pay and
be exact.

Nothing here is decided by a stopwatch: on a busy machine two starts of one run would then differ in
    their last bits.
"""

import ctypes
import sys
from pathlib import Path

import torch

from dsv3_mtp.ops import choice


def tune(device: torch.device) -> list[str]:
    """Turns on what helps on this device; one line on each for the log, and on the kernels. Call it
    before the model is made.
    """
    notes = [choice.describe(device)]
    return notes if device.type == "cuda" else notes + tune_cpu()


def tune_cpu() -> list[str]:
    notes = []
    if not mkl_uses_the_whole_cpu() and onednn_exact():
        torch.set_float32_matmul_precision("medium")
        notes.append(
            "float32 products may go to oneDNN, which is exact on this CPU; with AVX-512 it is "
            "faster than MKL"
        )
    if keep_freed_memory():
        notes.append("freed memory is kept for the next step")
    return notes


def mkl_uses_the_whole_cpu() -> bool:
    """Whether MKL, torch's default for float32 products, uses all of this CPU.

    On CPUs of other makers than Intel it stays at AVX2: 40 % of the peak of an AMD Zen 5, where
    oneDNN reaches 95 %. On Intel's (Ice Lake) oneDNN is at best equal.
    """
    cpuinfo = Path("/proc/cpuinfo")
    return not cpuinfo.exists() or "AuthenticAMD" not in cpuinfo.read_text()


def onednn_exact() -> bool:
    """Whether precision "medium", which hands float32 products to oneDNN, still computes them in
    float32.

    Where a CPU has bfloat16 matrix units it does not: a relative error of 3e-3 instead of 3e-7.
    """
    before = torch.get_float32_matmul_precision()
    # not torch's own: a start must not move its random numbers
    generator = torch.Generator().manual_seed(0)
    x, weight = (
        torch.randn(512, 256, generator=generator),
        torch.randn(256, 256, generator=generator),
    )
    exact = x.double() @ weight.double()
    torch.set_float32_matmul_precision("medium")
    try:
        return ((x @ weight).double() - exact).norm().item() < 1e-6 * exact.norm().item()
    finally:
        torch.set_float32_matmul_precision(before)


def keep_freed_memory() -> bool:
    """Tells glibc to keep what is freed: a page given back costs ten times a copy of it when it is
    touched again.

    The process stays as large as its largest step. False where the C library is another.
    """
    if sys.platform != "linux" or not hasattr(library := ctypes.CDLL(None), "mallopt"):
        return False
    trim, pad, mmap = -1, -2, -3  # malloc.h: M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD
    settings = ((mmap, 1 << 30), (trim, 2**31 - 1), (pad, 64 << 20))
    return all([library.mallopt(ctypes.c_int(key), ctypes.c_int(value)) for key, value in settings])
