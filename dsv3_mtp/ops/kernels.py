"""C kernels of a training step on a CPU, in float32 and bfloat16: the passes between the matrix
products, and attention and the routed experts with their products (csrc/).

Off until `enable()`, which the trainer calls: it builds them with the system's C compiler, in
seconds and once per machine. Where there is none, on a GPU, in other dtypes and under a compiler,
the model's own torch operations run; the two agree to the dtype's rounding. Every function below
needs contiguous tensors unless it says otherwise; factors per row (gates, scales, weights of the
loss) and angles are float32 beside either dtype.
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
from typing import NamedTuple

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
# numbers of one expert's down projection that are still worth it: its 3 matrices in float32 are 3
# MiB
EXPERT = 2**18
# blocks of rows whose sums are added last: the same for any number of threads, hence the same
# result
PARTS = 16

_P, _I, _F = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
_SIGNATURES = {
    "rms_norm": [_P, _I, _P, _P, _P, _I, _I, _F],
    "rms_norm_backward": [_P, _P, _I, _P, _P, _P, _P, _I, _I, _I],
    "swiglu": [_P, _P, _P, _I, _I],
    "swiglu_backward": [_P, _P, _P, _P, _P, _I, _I],
    "attention": [_P, _P, _P, _I, _P, _P, _P, _P, _P, _I, _I, _I, _I, _I, _I, _F],
    "attention_backward": [
        _P,
        _P,
        _P,
        _I,
        _P,
        _P,
        _P,
        _P,
        _P,
        _P,
        _P,
        _P,
        _P,
        _I,
        _I,
        _I,
        _I,
        _I,
        _I,
        _F,
    ],
    "experts": [*[_P] * 8, _I, _I, _I],
    "experts_backward": [*[_P] * 12, _I, _I, _I],
    "sum_rows": [_P, _P, _P, _I, _I, _I],
    "cross_entropy": [_P, _P, _P, _P, _P, _I, _I],
}
_STORED = {torch.float32: (), torch.bfloat16: ("-DBFLOAT16",)}
_libraries: dict[torch.dtype, ctypes.CDLL] = {}


def enable() -> str:
    """Builds the kernels where that has not been done, and uses them from now on. Returns one line
    on the outcome.
    """
    if not _libraries:
        try:
            libraries = {dtype: _load(_build(flags)) for dtype, flags in _STORED.items()}
        except (OSError, RuntimeError, ValueError, subprocess.SubprocessError) as error:
            reason = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[0]
            return f"C kernels: not built, torch's operations run instead ({reason})"
        _libraries.update(libraries)
    return "C kernels for float32 and bfloat16 on the CPU"


def disable() -> None:
    """Back to torch's operations."""
    _libraries.clear()


def usable(*tensors: Tensor) -> bool:
    """Whether the kernels are on and take these tensors, which must have one dtype."""
    if torch.compiler.is_compiling() or tensors[0].dtype not in _libraries:
        return False
    return all(x.dtype == tensors[0].dtype and x.device.type == "cpu" for x in tensors)


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
                write_text(made[1], file_digest(temporary))
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
    """A built library with its functions.

    Raises:
        OSError, ValueError: it cannot be loaded, or is not what was built there.
    """
    _require_own(path)
    # the loader would crash on a library that is cut off
    if difference(path, path.with_suffix(".digest").read_text()) is not None:
        path.unlink()
        raise ValueError(f"{path} was damaged and is deleted; the next start builds it again")
    library = ctypes.CDLL(str(path))
    if missing := [name for name in _SIGNATURES if not hasattr(library, name)]:
        raise ValueError(f"{path} lacks {', '.join(missing)}; delete it")
    for name, signature in _SIGNATURES.items():
        getattr(library, name).argtypes = signature
        getattr(library, name).restype = None
    return library


@functools.cache
def _processor() -> str:
    """What -march=native depends on."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next(
        (line for line in lines if line.startswith(("flags", "Features"))), platform.processor()
    )


def _call(name: str, dtype: torch.dtype, *arguments: Tensor | int | float | None) -> None:
    values = [value.data_ptr() if isinstance(value, Tensor) else value for value in arguments]
    getattr(_libraries[dtype], name)(*values)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x: (rows, C), contiguous in C only -> y (rows, C), 1/rms (rows,)."""
    y, scale = x.new_empty(x.shape), x.new_empty(x.shape[0], dtype=torch.float32)
    _call("rms_norm", x.dtype, x, x.stride(0), weight, y, scale, *x.shape, eps)
    return y, scale


def rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """-> gradients of x (rows, C) and of weight (C,)."""
    grad_x, partial = x.new_empty(x.shape), scale.new_empty(PARTS, x.shape[1])
    _call(
        "rms_norm_backward",
        x.dtype,
        grad,
        x,
        x.stride(0),
        weight,
        scale,
        grad_x,
        partial,
        *x.shape,
        PARTS,
    )
    return grad_x, partial.sum(0).to(weight.dtype)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up. (rows, F) each."""
    y = torch.empty_like(gate)
    _call("swiglu", gate.dtype, gate, up, y, *gate.shape)
    return y


def swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """-> gradients of gate and up."""
    grads = torch.empty_like(gate), torch.empty_like(up)
    _call("swiglu_backward", gate.dtype, gate, up, grad, *grads, *gate.shape)
    return grads


def attention(
    query: Tensor, kv: Tensor, k_rope: Tensor, angles: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Causal attention, rotary parts turned on the way.

    Args:
        query: (B, T, H, nope+P); kv: (B, T, H, nope+v) keys and values; k_rope: (B, T, P), shared
            by the heads, whose rows need only be equally far apart.
        angles: (2, T, P/2) cos and sin.
    Returns:
        (B, T, H, v), and of every softmax the largest score and 1 / sum for the backward, (2, B, H,
        T).
    """
    sizes = _attention_sizes(query, kv, k_rope)
    out, softmax = (
        query.new_empty(*query.shape[:3], sizes[-1]),
        angles.new_empty(2, sizes[0], sizes[2], sizes[1]),
    )
    inputs = (query, kv, k_rope, k_rope.stride(1), angles[0], angles[1])
    _call("attention", query.dtype, *inputs, out, softmax[0], softmax[1], *sizes, scale)
    return out, softmax


def attention_backward(
    grad: Tensor,
    query: Tensor,
    kv: Tensor,
    k_rope: Tensor,
    angles: Tensor,
    softmax: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """grad: (B, T, H, v) -> gradients of query, kv and k_rope."""
    batch, length, heads, *_ = sizes = _attention_sizes(query, kv, k_rope)
    grads = torch.empty_like(query), torch.empty_like(kv), k_rope.new_empty(k_rope.shape)
    each = angles.new_empty(batch, heads, length, k_rope.shape[-1])  # of k_rope from each head
    inputs = (
        query,
        kv,
        k_rope,
        k_rope.stride(1),
        angles[0],
        angles[1],
        grad,
        softmax[0],
        softmax[1],
    )
    _call(
        "attention_backward",
        query.dtype,
        *inputs,
        grads[0],
        grads[1],
        each,
        grads[2],
        *sizes,
        scale,
    )
    return grads


def _attention_sizes(query: Tensor, kv: Tensor, k_rope: Tensor) -> tuple[int, ...]:
    """B, T, H, nope, P, v."""
    (batch, length, heads, width), rope = query.shape, k_rope.shape[-1]
    return batch, length, heads, width - rope, rope, kv.shape[-1] - (width - rope)


class Rows(NamedTuple):
    """Token-expert pairs sorted by expert."""

    source: Tensor  # (rows,) int64: the token of each
    first: Tensor  # (E + 1,) int64: where each expert's rows begin, and end
    gates: Tensor  # (rows,) float32


def experts_usable(*tensors: Tensor) -> bool:
    """x, gate_up, down of `experts`: one expert's weights fit into a core's cache, in whole
    vectors, and the CPU has no matrix units, which only oneDNN uses.
    """
    if not usable(*tensors) or (tensors[0].dtype == torch.bfloat16 and "amx_bf16" in _processor()):
        return False
    _, width, hidden = tensors[2].shape
    return width % 32 == 0 and hidden % 32 == 0 and width * hidden <= EXPERT


def experts(x: Tensor, gate_up: Tensor, down: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
    """gate * down(silu(gate_proj(x)) * up_proj(x)) of each row.

    x: (N, C), gate_up: (E, 2F, C), gate rows first, down: (E, C, F) -> (rows, C), and (rows, 2F)
        for the backward.
    """
    (number, width, hidden), count = down.shape, len(rows.source)
    inner, out = x.new_empty(count, 2 * hidden), x.new_empty(count, width)
    _call("experts", x.dtype, x, gate_up, down, *rows, inner, out, number, width, hidden)
    return out, inner


def experts_backward(
    grad: Tensor,
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    inner: Tensor,
    rows: Rows,
    needed: tuple[bool, bool],
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """grad: (N, C), of the sum over each token's rows -> gradients of every row's x (rows, C), of
    its gate (rows,), and of gate_up and down where `needed`.
    """
    grad_rows, grad_gates = x.new_empty(len(rows.source), x.shape[1]), torch.empty_like(rows.gates)
    grads = [
        torch.empty_like(w) if wanted else None
        for w, wanted in zip((gate_up, down), needed, strict=True)
    ]
    inputs = (x, gate_up, down, *rows, inner, grad)
    _call("experts_backward", x.dtype, *inputs, grad_rows, grad_gates, *grads, *down.shape)
    return grad_rows, grad_gates, grads[0], grads[1]


def sum_rows(x: Tensor, index: Tensor) -> Tensor:
    """x[index].sum(1), added up in float32. x: (rows, C), index: (N, K) int64 -> (N, C)."""
    y = x.new_empty(len(index), x.shape[1])
    _call("sum_rows", x.dtype, x, index, y, *index.shape, x.shape[1])
    return y


def cross_entropy_(logits: Tensor, targets: Tensor, row_weight: Tensor) -> tuple[Tensor, Tensor]:
    """logits (rows, V) become row_weight * (softmax - onehot); returns nll (float32) and
    prediction, (rows,) each.
    """
    nll, prediction = torch.empty_like(row_weight), torch.empty_like(targets)
    _call(
        "cross_entropy", logits.dtype, logits, targets, row_weight, nll, prediction, *logits.shape
    )
    return nll, prediction
