"""Puts a model's linear layers into FP8: which layers, by which backend, and why."""

import re
from collections.abc import Callable

import torch
from torch import nn

from dsv3_mtp.config import Config, FP8Config
from dsv3_mtp.ops.cores import choose_attention
from dsv3_mtp.precision import hopper, te
from dsv3_mtp.precision.emulate import Emulated
from dsv3_mtp.precision.linear import FP8Linear, Recipe
from dsv3_mtp.precision.quantise import BLOCK, ROW

# Which of `fp8.modules` a layer belongs to, by its name in the model (V3 Fig. 6 and section 3.3.1).
KINDS = {
    "attention": r"\.self_attn\.\w+_proj\w*$",
    "dense_mlp": r"\.mlp\.(gate|up|down)_proj$",
    "shared_experts": r"\.mlp\.shared_experts\.\w+_proj$",
    "routed_experts": r"\.mlp\.experts$",
    "eh_proj": r"\.eh_proj$",
}
UNSUPPORTED: dict[str, Callable[[torch.device], str | None]] = {
    "te": te.unsupported,
    "torch": hopper.unsupported,
    "emulate": lambda device: None,
}


def set_precision(model: nn.Module, config: Config, device: torch.device) -> list[str]:
    """Puts a run's model into the numbers and on the attention kernel of its config; one line on
    each.

    Raises:
        ValueError: what the config names cannot run here, or not with this model.
    """
    shape, dtype = config.model, getattr(torch, config.train.dtype)
    core, note = choose_attention(
        config.attention.backend,
        heads=shape.num_attention_heads // config.parallel.sequence_parallel_size,
        widths=(shape.qk_nope_head_dim + shape.qk_rope_head_dim, shape.v_head_dim),
        dtype=dtype,
        device=device,
        masked=config.data.mask_documents,
    )
    for module in model.modules():
        if hasattr(module, "core"):
            module.core = core  # type: ignore[assignment]
    return [convert(model, config.fp8, device, dtype), note]


def choose_backend(fp8: FP8Config, device: torch.device) -> tuple[str | None, str]:
    """The backend that runs here (None: high precision) and a line that says why.

    Raises:
        ValueError: the backend that the config names, or FP8 itself where it is `true`, cannot run
            here.
    """
    if fp8.enabled is False:
        return None, "fp8: off (fp8.enabled: false)"
    reasons = {name: unsupported(device) for name, unsupported in UNSUPPORTED.items()}
    if fp8.backend != "auto":
        reason = reasons[fp8.backend]
        if reason is None:
            return fp8.backend, f"fp8: {fp8.backend} (fp8.backend)"
        if fp8.enabled is True:
            raise ValueError(
                f"fp8.backend: {fp8.backend} {reason}; choose "
                "another fp8.backend, or fp8.enabled: auto"
            )
        return None, f"fp8: off ({fp8.backend} {reason})"
    why = "; ".join(f"{name} {reason}" for name, reason in reasons.items() if reason is not None)
    if fp8.enabled == "auto" and reasons["te"] and reasons["torch"]:
        return None, f"fp8: off ({why}; fp8.enabled: true emulates it)"
    chosen = next(name for name, reason in reasons.items() if reason is None)
    return chosen, f"fp8: {chosen}" + (f" ({why})" if why else "")


def fp8_layers(model: nn.Module, fp8: FP8Config) -> dict[str, nn.Module]:
    """The layers that the config puts into FP8, by name."""
    wanted = re.compile("|".join(KINDS[kind] for kind in fp8.modules))
    layers = {name: module for name, module in model.named_modules() if wanted.search(name)}
    return {
        name: module for name, module in layers.items() if fp8.mtp or not name.startswith("mtp.")
    }


def convert(model: nn.Module, fp8: FP8Config, device: torch.device, dtype: torch.dtype) -> str:
    """Replaces the chosen layers in place; parameters keep their names and values. Returns what was
    done and why.

    Args:
        dtype: in which the model will compute. Its weights may still be float32, which DeepSpeed
            turns into it later.

    Raises:
        ValueError: the backend cannot run here, or not with these layers.
    """
    backend, note = choose_backend(fp8, device)
    if backend is None:
        return note
    layers = fp8_layers(model, fp8)
    if problem := unsuited(layers, fp8, backend, dtype):
        if fp8.enabled == "auto":
            return f"fp8: off ({problem})"
        raise ValueError(problem)
    tile = BLOCK if fp8.gradient_tile == "block" else ROW
    emulated = Emulated(fp8.scale, fp8.accumulation)
    recipe = Recipe(emulated if backend == "emulate" else hopper.ScaledMM(fp8.scale), tile)
    for name, module in layers.items():
        if isinstance(module, nn.Linear):
            replacement = (
                te.TELinear(module, fp8.scale) if backend == "te" else FP8Linear(module, recipe)
            )
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, replacement)
        elif backend == "te":
            module.linear = te.TEGroupedLinear(fp8.scale), te.TEGroupedLinear(fp8.scale)  # type: ignore[assignment]
        else:
            module.linear = recipe.grouped_linear, recipe.grouped_linear  # type: ignore[assignment]
            module.multiple = recipe.product.multiple  # type: ignore[assignment]
    return (
        f"{note}: {len(layers)} layers "
        f"({', '.join(fp8.modules)}{'' if fp8.mtp else ', MTP blocks not'})"
    )


def unsuited(
    layers: dict[str, nn.Module], fp8: FP8Config, backend: str, dtype: torch.dtype
) -> str | None:
    """What this backend does not multiply of these layers, and what to do about it; None if it
    takes all.
    """
    if not layers:
        return (
            "fp8.modules: the model has no layer of "
            f"{', '.join(fp8.modules)}; set fp8.enabled: false"
        )
    if backend == "emulate":
        return None
    if dtype != torch.bfloat16:
        return f"fp8.backend: {backend} needs train.dtype: bfloat16 (got {str(dtype)[6:]})"
    shapes = {  # ZeRO-3 keeps the whole shape in ds_shape
        name: getattr(p, "ds_shape", p.shape)
        for name, layer in layers.items()
        for p in layer.parameters()
    }
    odd = [
        f"{name} {list(shape)}"
        for name, shape in shapes.items()
        if any(n % hopper.ALIGN for n in shape[-2:])
    ]
    if odd:
        return (
            f"fp8.backend: {backend} needs weights whose "
            f"sides are multiples of {hopper.ALIGN}; not so: "
            f"{', '.join(odd[:5])}{' ...' if len(odd) > 5 else ''}; "
            "change the model, or fp8.modules"
        )
    return None
