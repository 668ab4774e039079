"""Settings of this process that make training on a CPU faster, each tried out before it is used."""

import ctypes
import sys
import time

import torch

from dsv3_mtp import kernels

FASTER = 1.5  # oneDNN has to beat the default by this: far above what a busy machine adds to either


def tune_cpu() -> list[str]:
    """Turns on what helps on this machine; one line on each for the log. Call it before the model is made."""
    notes = [kernels.enable()]
    if onednn_pays():
        torch.set_float32_matmul_precision("medium")
        notes.append("float32 products by oneDNN, in full precision on this CPU")
    if keep_freed_memory():
        notes.append("freed memory is kept for the next step")
    return notes


def onednn_pays() -> bool:
    """Whether precision "medium" is as exact as "highest" here, and much faster.

    It hands float32 products to oneDNN, which may compute in bfloat16 where the CPU has that (a relative error of
    3e-3). Where it has not, they stay float32, and are 2.4 times as fast as MKL's on CPUs that MKL was not written for.
    """
    before = torch.get_float32_matmul_precision()
    x, weight = torch.randn(512, 256), torch.randn(256, 256)
    exact = x.double() @ weight.double()
    seconds = {}
    try:
        for precision in ("highest", "medium"):
            torch.set_float32_matmul_precision(precision)
            error = ((x @ weight).double() - exact).norm() / exact.norm()
            seconds[precision] = min(_cpu_seconds(x, weight) for _ in range(8))
    finally:
        torch.set_float32_matmul_precision(before)
    return error.item() < 1e-6 and seconds["medium"] * FASTER < seconds["highest"]


def _cpu_seconds(x: torch.Tensor, weight: torch.Tensor) -> float:
    start = time.thread_time()
    torch.mm(x, weight)
    return time.thread_time() - start


def keep_freed_memory() -> bool:
    """Tells glibc to keep what is freed: a page given back costs ten times a copy of it when it is touched again.

    The process stays as large as its largest step. False where the C library is another.
    """
    if sys.platform != "linux" or not hasattr(library := ctypes.CDLL(None), "mallopt"):
        return False
    trim, pad, mmap = -1, -2, -3  # malloc.h: M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD
    settings = ((mmap, 1 << 30), (trim, 2**31 - 1), (pad, 64 << 20))
    return all([library.mallopt(ctypes.c_int(key), ctypes.c_int(value)) for key, value in settings])
