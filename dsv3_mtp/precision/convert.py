"""What a run's layers compute in: which of them in FP8, by which backend, on which attention
kernel, and why.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

from dsv3_mtp.config import Config, FP8Config
from dsv3_mtp.ops import compute as high
from dsv3_mtp.ops.compute import Compute, Kind, building
from dsv3_mtp.ops.cores import choose_attention
from dsv3_mtp.precision import hopper, te
from dsv3_mtp.precision.emulate import Emulated
from dsv3_mtp.precision.linear import FP8Linear, Recipe, RoutedExperts
from dsv3_mtp.precision.quantise import BLOCK, ROW

UNSUPPORTED: dict[str, Callable[[torch.device], str | None]] = {
    "te": te.unsupported,
    "torch": hopper.unsupported,
    "emulate": lambda device: None,
}


def choose_compute(
    config: Config, device: torch.device, make: Callable[[], nn.Module]
) -> tuple[Compute, list[str]]:
    """The numbers and the attention kernel of a run's config; one line on each that the config
    names, and on a GPU on both: what the hardware could do and does not costs money there.

    Args:
        make: builds the run's model on the meta device, to see which layers it has.

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
    compute, fp8_note = fp8_compute(config.fp8, device, dtype, make)
    heads = None if compute.heads is None else replace(compute.heads, core=core)
    gpu = device.type == "cuda"
    notes = [fp8_note] * (gpu or config.fp8.enabled is True)
    notes += [note] * (gpu or config.attention.backend != "auto")
    return replace(compute, core=core, heads=heads), notes


def fp8_compute(
    fp8: FP8Config, device: torch.device, dtype: torch.dtype, make: Callable[[], nn.Module]
) -> tuple[Compute, str]:
    """The layers that the config puts into FP8, and what was decided and why.

    Args:
        dtype: in which the model will compute. Its weights may still be float32, which DeepSpeed
            turns into it later.
        make: see `choose_compute`.

    Raises:
        ValueError: the backend cannot run here, or not with these layers.
    """
    backend, note = choose_backend(fp8, device)
    if backend is None:
        return Compute(), note
    compute = _in_fp8(fp8, backend)
    with building(compute):
        layers = fp8_layers(make())
    if problem := unsuited(layers, fp8, backend, dtype):
        if fp8.enabled == "auto":
            return Compute(), f"fp8: off ({problem})"
        raise ValueError(problem)
    blocks = "" if fp8.mtp else ", MTP blocks not"
    return compute, f"{note}: {len(layers)} layers ({', '.join(fp8.modules)}{blocks})"


def _in_fp8(fp8: FP8Config, backend: str) -> Compute:
    tile = BLOCK if fp8.gradient_tile == "block" else ROW
    emulated = Emulated(fp8.scale, fp8.accumulation)
    recipe = Recipe(emulated if backend == "emulate" else hopper.ScaledMM(fp8.scale), tile)

    def linear(kind: Kind, inputs: int, outputs: int) -> nn.Linear:
        if kind not in fp8.modules:
            return high.linear(kind, inputs, outputs)
        if backend == "te":
            return te.TELinear(inputs, outputs, fp8.scale)
        return FP8Linear(inputs, outputs, recipe)

    def routed() -> RoutedExperts:
        if backend == "te":  # each keeps buffers of its layer
            return RoutedExperts(te.TEGroupedLinear(fp8.scale), te.TEGroupedLinear(fp8.scale))
        product = recipe.grouped_linear
        return RoutedExperts(product, product, recipe.product.multiple)

    compute = Compute(linear=linear)
    if "routed_experts" in fp8.modules:
        compute = replace(compute, routed=routed)
    return compute if fp8.mtp else replace(compute, heads=Compute())


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


def fp8_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers of a model that compute in FP8, by name."""
    kinds = FP8Linear | te.TELinear
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, kinds) or isinstance(getattr(module, "routed", None), RoutedExperts)
    }


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
