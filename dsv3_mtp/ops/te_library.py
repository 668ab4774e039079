"""Loads Transformer Engine: cores.py has its attention, precision/te.py its FP8 products."""

import ctypes
import functools
import os
from pathlib import Path
from typing import Any

import torch


@functools.cache
def load() -> tuple[Any, str]:
    """(transformer_engine.pytorch, "") or (None, why not). It fails in more ways than
    ImportError.
    """
    try:
        load_cudnn()
        import transformer_engine.pytorch as te

        available, reason = te.is_fp8_block_scaling_available(return_reason=True)
    except Exception as error:
        why = f"{type(error).__name__}: {error}"
        return None, f"cannot be imported ({why}); pip install -e '.[te]' after torch"
    return (te, "") if available else (None, f"has no FP8 block scaling here: {reason}")


def load_cudnn() -> None:
    """All of the cuDNN that pip installed for torch. TE would take the system's for what torch has
    not loaded yet, and two versions in one process break each other.
    """
    folder = Path(torch.__file__).parents[1] / "nvidia" / "cudnn"
    if folder.exists():
        os.environ.setdefault("CUDNN_HOME", str(folder))
        for library in sorted(folder.glob("lib/libcudnn*.so.9")):
            ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
