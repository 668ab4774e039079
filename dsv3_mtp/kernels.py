"""C loops for the passes between the matrix products of a training step on a CPU, in float32 and bfloat16 (kernels.c).

Off until `enable()`, which the trainer calls: it builds them with the system's C compiler, in seconds and once per
machine. Where there is none, on a GPU, in other dtypes and under a compiler, the model's own torch operations run; the
two agree to the dtype's rounding. Every function below needs contiguous tensors unless it says otherwise; factors per
row (gates, scales, weights of the loss) and angles are float32 beside either dtype.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
from pathlib import Path

import torch
from torch import Tensor

FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-shared", "-fPIC")
PARTS = 16  # blocks of rows whose sums are added last: the same for any number of threads, hence the same result

_P, _I, _F = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
_SIGNATURES = {
    "rms_norm": [_P, _I, _P, _P, _P, _I, _I, _F],
    "rms_norm_backward": [_P, _P, _I, _P, _P, _P, _P, _I, _I, _I],
    "swiglu": [_P, _P, _I, _P, _P, _I, _I],
    "swiglu_backward": [_P, _P, _I, _P, _P, _P, _P, _P, _P, _I, _I],
    "causal_softmax": [_P, _I, _I, _I, _I, _F],
    "causal_softmax_backward": [_P, _P, _I, _I, _I, _I, _F],
    "heads": [_P, _P, _P, _I, _P, _P, _P, _P, _P, _I, _I, _I, _I, _I, _I, _I],
    "gather_rows": [_P, _P, _P, _I, _I],
    "sum_rows": [_P, _P, _P, _I, _I, _I],
    "cross_entropy": [_P, _P, _P, _P, _P, _I, _I],
}
_STORED = {torch.float32: (), torch.bfloat16: ("-DBFLOAT16",)}
_libraries: dict[torch.dtype, ctypes.CDLL] = {}


def enable() -> str:
    """Builds the kernels where that has not been done, and uses them from now on. Returns one line on the outcome."""
    if not _libraries:
        try:
            libraries = {dtype: ctypes.CDLL(str(_build(flags))) for dtype, flags in _STORED.items()}
        except (OSError, RuntimeError, subprocess.SubprocessError) as error:
            reason = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[0]
            return f"C kernels: not built, torch's operations run instead ({reason})"
        for library in libraries.values():
            for name, signature in _SIGNATURES.items():
                getattr(library, name).argtypes = signature
                getattr(library, name).restype = None
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
    """The shared library of this source, compiler and processor in the user's cache; made if it is missing."""
    source = Path(__file__).with_suffix(".c")
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        raise OSError("there is no C compiler; install one, or name it in CC")
    key = hashlib.sha256(source.read_bytes())
    key.update(repr((compiler, FLAGS, flags, platform.node(), _processor())).encode())
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dsv3_mtp"
    target = cache / f"kernels-{key.hexdigest()[:16]}.so"
    if not target.exists():
        cache.mkdir(parents=True, exist_ok=True)
        temporary = target.with_suffix(f".{os.getpid()}.tmp")  # a process that dies or races leaves no half library
        command = [compiler, *FLAGS, *flags, str(source), "-o", str(temporary), "-lm"]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
        temporary.replace(target)
    return target


def _processor() -> str:
    """What -march=native depends on."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())


def _call(name: str, dtype: torch.dtype, *arguments: Tensor | int | float | None) -> None:
    values = [value.data_ptr() if isinstance(value, Tensor) else value for value in arguments]
    getattr(_libraries[dtype], name)(*values)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x: (rows, C), contiguous in C only -> y (rows, C), 1/rms (rows,)."""
    y, scale = x.new_empty(x.shape), x.new_empty(x.shape[0], dtype=torch.float32)
    _call("rms_norm", x.dtype, x, x.stride(0), weight, y, scale, *x.shape, eps)
    return y, scale


def rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """-> gradients of x (rows, C) and of weight (C,)."""
    grad_x, partial = x.new_empty(x.shape), scale.new_empty(PARTS, x.shape[1])
    _call("rms_norm_backward", x.dtype, grad, x, x.stride(0), weight, scale, grad_x, partial, *x.shape, PARTS)
    return grad_x, partial.sum(0).to(weight.dtype)


def swiglu(gate: Tensor, up: Tensor, factors: Tensor | None = None) -> Tensor:
    """silu(gate) * up * factors. gate, up: (rows, F), contiguous in F, rows equally far apart; factors: (rows,)."""
    y = gate.new_empty(gate.shape)
    _call("swiglu", gate.dtype, gate, up, gate.stride(0), factors, y, *gate.shape)
    return y


def swiglu_backward(
    grad: Tensor, gate: Tensor, up: Tensor, grad_gate: Tensor, grad_up: Tensor, factors: Tensor | None = None
) -> Tensor | None:
    """Fills in grad_gate and grad_up, which lie as gate and up do; returns the gradient of `factors` (rows,).

    With factors, `grad` is overwritten with the forward's result.
    """
    grad_factors = None if factors is None else torch.empty_like(factors)
    sides = (gate, up, gate.stride(0), factors, grad, grad_gate, grad_up, grad, grad_factors)
    _call("swiglu_backward", gate.dtype, *sides, *gate.shape)
    return grad_factors


def causal_softmax_(scores: Tensor, first: int, scale: float) -> Tensor:
    """softmax(scale * scores) of the first `first + r + 1` columns of row r, in place. scores: (batch, rows, width)."""
    _call("causal_softmax", scores.dtype, scores, *scores.shape, first, scale)
    return scores


def causal_softmax_backward_(grad: Tensor, probs: Tensor, first: int, scale: float) -> Tensor:
    """In place: gradient of the probabilities -> of the scores."""
    _call("causal_softmax_backward", grad.dtype, probs, grad, *grad.shape, first, scale)
    return grad


def heads(projected: list[Tensor], angles: Tensor, separate: list[Tensor], *, back: bool) -> None:
    """Fills in the attention heads from the projections, rotary parts turned; `back`: gradients the other way.

    Args:
        projected: query (B, T, H, nope+P), keys and values (B, T, H, nope+v), the shared rotary key (B, T, P), which
            need be contiguous in P only.
        angles: (2, T, P/2) cos and sin.
        separate: q and k, each (B, H, T, nope+P), and v (B, H, T, v).
    """
    k_rope, (q, _, v) = projected[2], separate
    (batch, heads, length, width), rope = q.shape, k_rope.shape[-1]
    sizes = (batch, length, heads, width - rope, rope, v.shape[-1], int(back))
    _call("heads", q.dtype, *projected, k_rope.stride(1), angles[0], angles[1], *separate, *sizes)


def gather_rows(x: Tensor, index: Tensor, out: Tensor | None = None) -> Tensor:
    """x[index]. x: (N, C), index: (rows,) int64 -> (rows, C)."""
    y = x.new_empty(len(index), x.shape[1]) if out is None else out
    _call("gather_rows", x.dtype, x, index, y, *y.shape)
    return y


def sum_rows(x: Tensor, index: Tensor) -> Tensor:
    """x[index].sum(1), added up in float32. x: (rows, C), index: (N, K) int64 -> (N, C)."""
    y = x.new_empty(len(index), x.shape[1])
    _call("sum_rows", x.dtype, x, index, y, *index.shape, x.shape[1])
    return y


def cross_entropy_(logits: Tensor, targets: Tensor, row_weight: Tensor) -> tuple[Tensor, Tensor]:
    """logits (rows, V) become row_weight * (softmax - onehot); returns nll (float32) and prediction, (rows,) each."""
    nll, prediction = torch.empty_like(row_weight), torch.empty_like(targets)
    _call("cross_entropy", logits.dtype, logits, targets, row_weight, nll, prediction, *logits.shape)
    return nll, prediction
