"""The shared library of the C kernels (csrc/), one for each type of tensor.

The system's C compiler builds it in seconds, once per machine, when it is first asked for. c.py
checks the arguments of each function and calls it.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from dsv3_mtp.files.atomic import lock, replacing, sweep, write_text
from dsv3_mtp.files.digest import difference, file_digest

FLAGS = (
    *("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-shared"),
    *("-fPIC",),
)
TYPES: dict[torch.dtype, tuple[str, ...]] = {torch.float32: (), torch.bfloat16: ("-DBFLOAT16",)}


# Arguments of each function: p a pointer, i an int64, f a float.
_SIGNATURES = {
    "rms_norm": "pipppiif",
    "rms_norm_backward": "ppippppiii",
    "swiglu": "pipippii",
    "swiglu_backward": "ppipipppippii",
    "attention": "pppippppppiiiiiif",
    "attention_backward": "pppipppppppppp" + "iiiiiif",
    "sum_rows": "pippiii",
    "cross_entropy": "pppppii",
    "dequantise": "pppiii",
    "decode_layers": "ppippppppiiipi",
    "decode_linear": "pppiii",
    "decode_codes": "piippp",
    "decode_largest": "ppii",
    "decode_step": "ppifppp",
}


_TYPES = {"p": ctypes.c_void_p, "i": ctypes.c_int64, "f": ctypes.c_float}


def unavailable(dtype: torch.dtype) -> str | None:
    """Why the kernels do not run for tensors of this type, None where they do."""
    if dtype not in TYPES:
        return f"there are none for {dtype}"
    return _library(dtype)[1]


@functools.cache
def _library(dtype: torch.dtype) -> tuple[ctypes.CDLL | None, str | None]:
    """The library for tensors of this type, or why there is none. Made once."""
    try:
        library = _load(_build(TYPES[dtype]))
    except (OSError, RuntimeError, ValueError, subprocess.SubprocessError) as error:
        return None, (getattr(error, "stderr", None) or str(error)).strip().splitlines()[0]
    for name, signature in _SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes = [_TYPES[kind] for kind in signature]
        # of what is wrong
        counts = name in ("sum_rows", "decode_layers", "decode_largest", "decode_step")
        function.restype = ctypes.c_int64 if counts else None
    return library, None


def _build(flags: tuple[str, ...]) -> Path:
    """The shared library of this source, compiler and processor in the cache, made if missing."""
    folder = Path(__file__).parent / "csrc"
    sources = sorted(folder.glob("*.c"))
    name, *arguments = shlex.split(os.environ.get("CC", "")) or ["cc"]  # such as "ccache gcc"
    compiler = shutil.which(name)
    if compiler is None:
        raise OSError("there is no C compiler; install one, or name it in CC")
    key = hashlib.sha256(
        b"".join(source.read_bytes() for source in (*folder.glob("*.h"), *sources))
    )
    key.update(repr((compiler, arguments, FLAGS, flags, platform.node(), _processor())).encode())
    target = _cache() / f"kernels-{key.hexdigest()[:16]}.so"
    made = (target, target.with_suffix(".digest"))
    if all(path.exists() for path in made):
        return target
    descriptor = lock(target.with_name(".lock"), "waiting for the C kernels' build", wait=True)
    try:
        if not all(path.exists() for path in made):
            with replacing(target) as temporary:  # a process that dies leaves no half library
                output = ["-o", str(temporary), "-lm"]
                command = [compiler, *arguments, *FLAGS, *flags, *map(str, sources), *output]
                subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
                temporary.chmod(0o700)
                digest = file_digest(temporary)
            write_text(made[1], digest)  # last: who finds it finds the library that it belongs to
    finally:
        os.close(descriptor)
    return target


def _cache() -> Path:
    """The folder of the libraries. Only this user may write there, because its files are run.

    Raises:
        OSError: it is another user's, or others may write there.
    """
    base = Path(os.environ.get("XDG_CACHE_HOME") or "")
    # a relative one is to be ignored (XDG Base Directory Specification)
    cache = (base if base.is_absolute() else Path.home() / ".cache") / "dsv3_mtp"
    cache.mkdir(mode=0o700, parents=True, exist_ok=True)
    _require_own(cache)
    sweep(cache, older_than=3600.0)
    return cache


def _require_own(path: Path) -> None:
    about = path.stat()
    if about.st_uid != os.getuid() or about.st_mode & 0o022:
        raise OSError(
            f"{path} is another user's, or others may write it; delete it or chmod go-w it"
        )


def _load(path: Path) -> ctypes.CDLL:
    """A built library.

    Raises:
        OSError, ValueError: it cannot be loaded, lacks a function, or is not what was built there.
    """
    _require_own(path)
    # the loader would crash on a library that is cut off
    if difference(path, path.with_suffix(".digest").read_text()) is not None:
        path.with_suffix(".digest").unlink(missing_ok=True)  # first: without it, it is built
        path.unlink(missing_ok=True)
        raise ValueError(f"{path} was damaged and is deleted; the next start builds it again")
    library = ctypes.CDLL(str(path))
    if missing := [name for name in _SIGNATURES if not hasattr(library, name)]:
        raise ValueError(f"{path} lacks {', '.join(missing)}; delete it")
    return library


def _processor() -> str:
    """What -march=native depends on."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next(
        (line for line in lines if line.startswith(("flags", "Features"))), platform.processor()
    )


def call(name: str, dtype: torch.dtype, *arguments: Tensor | int | float | None) -> int | None:
    """Hands the tensors to C. C does not check shapes or types: the caller has."""
    values = [value.data_ptr() if isinstance(value, Tensor) else value for value in arguments]
    return function(name, dtype)(*values)


@functools.cache
def function(name: str, dtype: torch.dtype) -> Callable[..., int | None]:
    """A function of C, which takes addresses in place of tensors.

    Raises:
        RuntimeError: the library was not built.
    """
    library, reason = _library(dtype)
    if library is None:
        raise RuntimeError(f"{name}: the C kernels were not built: {reason}")
    return getattr(library, name)
