"""The C kernels of a training step on a CPU, in float32 and bfloat16 (csrc/): the passes between
the matrix products, and the attention core with its products.

They are built with the system's C compiler, in seconds and once per machine, when one is first
asked for. Arithmetic is float32 for both types; factors per row (scales, gates, weights of the
loss) and angles are float32 beside either. Every function checks what it hands to C: raw pointers
are followed without question there.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
from pathlib import Path

import torch
from torch import Tensor

from dsv3_mtp.files.atomic import lock, replacing, sweep, write_text
from dsv3_mtp.files.digest import difference, file_digest

FLAGS = (
    "-O3",
    "-march=native",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fopenmp",
    "-shared",
    "-fPIC",
)
# blocks of rows whose sums are added last: the same for any number of threads, hence the same
# result
PARTS = 16
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
        function.restype = ctypes.c_int64 if name == "sum_rows" else None
    return library, None


def _build(flags: tuple[str, ...]) -> Path:
    """The shared library of this source, compiler and processor in the user's cache; made if it is
    missing.
    """
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
    """The folder of the libraries, which nobody else may write: what lies there is run.

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


def _call(name: str, dtype: torch.dtype, *arguments: Tensor | int | float | None) -> int | None:
    """Hands the tensors to C, which believes what it is told of them."""
    library, reason = _library(dtype)
    if library is None:
        raise RuntimeError(f"{name}: the C kernels were not built: {reason}")
    values = [value.data_ptr() if isinstance(value, Tensor) else value for value in arguments]
    return getattr(library, name)(*values)


def _check(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """A contiguous tensor on the CPU with this shape and type.

    Raises:
        ValueError: it is another.
    """
    if tensor.shape != shape or tensor.dtype != dtype or tensor.device.type != "cpu":
        raise ValueError(
            f"{name}: must be {dtype} of shape {tuple(shape)} on the CPU (got {tensor.dtype} of "
            f"shape {tuple(tensor.shape)} on {tensor.device})"
        )
    if not tensor.is_contiguous():
        raise ValueError(f"{name}: must be contiguous (its strides are {tensor.stride()})")


def _check_rows(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """A matrix on the CPU whose rows are contiguous, each for itself.

    Raises:
        ValueError: it is another.
    """
    if tensor.ndim != 2 or tensor.stride(1) != 1:
        raise ValueError(
            f"{name}: must be a matrix with contiguous rows (got shape {tuple(tensor.shape)}, "
            f"strides {tensor.stride()})"
        )
    if tensor.shape != shape or tensor.dtype != dtype or tensor.device.type != "cpu":
        _check(name, tensor, shape, dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x: (rows, C), contiguous in C only; weight: (C,) -> y (rows, C), 1/rms (rows,)."""
    _check_rows("x", x, x.shape, x.dtype)
    _check("weight", weight, x.shape[1:], x.dtype)
    y, scale = x.new_empty(x.shape), x.new_empty(x.shape[0], dtype=torch.float32)
    _call("rms_norm", x.dtype, x, x.stride(0), weight, y, scale, *x.shape, eps)
    return y, scale


def rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """grad: (rows, C); the rest as in and from `rms_norm` -> gradients of x and of weight."""
    _check_rows("x", x, x.shape, x.dtype)
    _check("weight", weight, x.shape[1:], x.dtype)
    _check("grad", grad, x.shape, x.dtype)
    _check("scale", scale, x.shape[:1], torch.float32)
    grad_x, partial = x.new_empty(x.shape), scale.new_empty(PARTS, x.shape[1])
    inputs = grad, x, x.stride(0), weight, scale
    _call("rms_norm_backward", x.dtype, *inputs, grad_x, partial, *x.shape, PARTS)
    return grad_x, partial.sum(0).to(weight.dtype)


def swiglu(gate: Tensor, up: Tensor, factor: Tensor | None) -> Tensor:
    """silu(gate) * up * factor. gate, up: (rows, F), contiguous in F only; factor: (rows,) or
    None.
    """
    _check_rows("gate", gate, gate.shape, gate.dtype)
    _check_rows("up", up, gate.shape, gate.dtype)
    if factor is not None:
        _check("factor", factor, gate.shape[:1], torch.float32)
    y = gate.new_empty(gate.shape)
    inputs = gate, gate.stride(0), up, up.stride(0), factor
    _call("swiglu", gate.dtype, *inputs, y, *gate.shape)
    return y


def swiglu_backward(
    grad: Tensor, gate: Tensor, up: Tensor, factor: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """grad: (rows, F) -> gradients of gate and up as (rows, 2F), and where there is a factor its
    gradient (rows,) and the forward's result again.
    """
    _check_rows("gate", gate, gate.shape, gate.dtype)
    _check_rows("up", up, gate.shape, gate.dtype)
    _check("grad", grad, gate.shape, gate.dtype)
    (rows, width), (grad_factor, y) = gate.shape, (None, None)
    if factor is not None:
        _check("factor", factor, gate.shape[:1], torch.float32)
        grad_factor, y = torch.empty_like(factor), torch.empty_like(grad)
    both = gate.new_empty(rows, 2 * width)
    inputs = grad, gate, gate.stride(0), up, up.stride(0), factor
    outputs = both, both[:, width:], 2 * width, grad_factor, y
    _call("swiglu_backward", gate.dtype, *inputs, *outputs, rows, width)
    return both, grad_factor, y


def attention(
    query: Tensor, kv: Tensor, k_rope: Tensor, angles: Tensor, first: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Causal attention, rotary parts turned on the way.

    Args:
        query: (B, T, H, nope+P); kv: (B, T, H, nope+v) keys and values; k_rope: (B, T, P), shared
            by the heads, whose rows need only be equally far apart.
        angles: (2, T, P/2) cos and sin.
        first: (B, T) int64, the first slot that each slot attends to; None: 0.
    Returns:
        (B, T, H, v), and of every softmax the largest score and 1 / sum for the backward, (2, B, H,
        T).
    """
    sizes = _attention_sizes(query, kv, k_rope, angles, first)
    batch, length, heads, _, _, value = sizes
    out = query.new_empty(batch, length, heads, value)
    softmax = angles.new_empty(2, batch, heads, length)
    inputs = query, kv, k_rope, k_rope.stride(1), angles[0], angles[1], first
    _call("attention", query.dtype, *inputs, out, softmax[0], softmax[1], *sizes, scale)
    return out, softmax


def attention_backward(
    grad: Tensor,
    query: Tensor,
    kv: Tensor,
    k_rope: Tensor,
    angles: Tensor,
    first: Tensor | None,
    softmax: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """grad: (B, T, H, v); the rest as in and from `attention` -> gradients of query, kv and
    k_rope.
    """
    sizes = _attention_sizes(query, kv, k_rope, angles, first)
    batch, length, heads, _, rope, value = sizes
    _check("grad", grad, (batch, length, heads, value), query.dtype)
    _check("softmax", softmax, (2, batch, heads, length), torch.float32)
    grads = torch.empty_like(query), torch.empty_like(kv), k_rope.new_empty(k_rope.shape)
    each = angles.new_empty(batch, heads, length, rope)  # of k_rope from each head
    inputs = query, kv, k_rope, k_rope.stride(1), angles[0], angles[1], first
    outputs = grads[0], grads[1], each, grads[2]
    _call(
        "attention_backward",
        query.dtype,
        *(*inputs, grad, softmax[0], softmax[1], *outputs, *sizes, scale),
    )
    return grads


def _attention_sizes(
    query: Tensor, kv: Tensor, k_rope: Tensor, angles: Tensor, first: Tensor | None
) -> tuple[int, int, int, int, int, int]:
    """B, T, H, nope, P, v of checked operands."""
    (batch, length, heads, width), rope = query.shape, k_rope.shape[-1]
    nope = width - rope
    value = kv.shape[-1] - nope
    _check("query", query, (batch, length, heads, nope + rope), query.dtype)
    _check("kv", kv, (batch, length, heads, nope + max(value, 1)), query.dtype)
    _check("angles", angles, (2, length, rope // 2), torch.float32)
    if k_rope.shape != (batch, length, rope) or k_rope.dtype != query.dtype or rope % 2:
        raise ValueError(
            f"k_rope: must be {query.dtype} of shape {(batch, length, 'even')} "
            f"(got {k_rope.dtype} of shape {tuple(k_rope.shape)})"
        )
    if k_rope.stride(2) != 1 or k_rope.stride(0) != length * k_rope.stride(1):
        raise ValueError(f"k_rope: rows must be equally far apart (strides {k_rope.stride()})")
    if first is not None:
        _check("first", first, (batch, length), torch.int64)
    return batch, length, heads, nope, rope, value


def sum_rows(x: Tensor, index: Tensor) -> Tensor:
    """x[index].sum(1), added up in float32; -1 names no row. x: (rows, C), index: (N, K) int64 ->
    (N, C).

    Raises:
        IndexError: an index is neither -1 nor a row of x.
    """
    _check("x", x, (x.shape[0], x.shape[-1]), x.dtype)
    _check("index", index, (index.shape[0], index.shape[-1]), torch.int64)
    y = x.new_empty(index.shape[0], x.shape[1])
    if outside := _call("sum_rows", x.dtype, x, len(x), index, y, *index.shape, x.shape[1]):
        raise IndexError(f"index: {outside} numbers are outside -1 .. {len(x) - 1}, the rows of x")
    return y


def cross_entropy_(logits: Tensor, targets: Tensor, row_weight: Tensor) -> tuple[Tensor, Tensor]:
    """logits (rows, V) become row_weight * (softmax - onehot); returns nll (float32) and
    prediction, (rows,) each. A target outside 0 .. V-1 has the loss nan.
    """
    rows = logits.shape[:1]
    _check("logits", logits, (*rows, logits.shape[-1]), logits.dtype)
    _check("targets", targets, rows, torch.int64)
    _check("row_weight", row_weight, rows, torch.float32)
    nll, prediction = torch.empty_like(row_weight), torch.empty_like(targets)
    inputs = logits, targets, row_weight
    _call("cross_entropy", logits.dtype, *inputs, nll, prediction, *logits.shape)
    return nll, prediction
