"""From a checkpoint in DeepSeek-V3's layout to a model in memory; and the check of its keys."""

import itertools
import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsv3_mtp.config import ModelConfig, MTPConfig
from dsv3_mtp.config.reader import show
from dsv3_mtp.files.tensorfile import DTYPES
from dsv3_mtp.hf.files import Checkpoint
from dsv3_mtp.hf.keys import Slot, report, slot_count, slots, summarise
from dsv3_mtp.hf.settings import HFSettings, read_settings
from dsv3_mtp.model.causal_lm import DeepseekV3MTP, meta_model
from dsv3_mtp.model.moe import Experts
from dsv3_mtp.model.size import require_memory
from dsv3_mtp.precision.quantise import LARGEST, dequantise, scale_shape
from dsv3_mtp.precision.stored import SCALE, is_codes

# Keys of the model section without effect on what the model computes from given weights.
NO_EFFECT = {"initializer_range", "max_position_embeddings"}


def open_checkpoint(
    folder: Path, *, trunk_only: bool = False
) -> tuple[Checkpoint, HFSettings, list[Slot]]:
    """The files and settings of a complete checkpoint and the slots it fills, aliases it lacks left
    out.

    Raises:
        ValueError: truncated or missing files, missing or unused tensors, wrong shapes or types;
            all of them listed.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    settings = read_settings(folder)
    checkpoint = Checkpoint(folder)
    first, stop = (
        settings.model.num_hidden_layers,
        settings.model.num_hidden_layers + settings.modules,
    )
    module_names = tuple(f"model.layers.{layer}." for layer in range(first, stop))
    modules = 0 if trunk_only else settings.modules
    ignored = {name for name in checkpoint.places if trunk_only and name.startswith(module_names)}
    if (most := slot_count(settings.model, modules)) > 2 * len(checkpoint.places) + 10_000:
        raise ValueError(
            f"{folder}: config.json describes {most:,} tensors, the files hold "
            f"{len(checkpoint.places):,}"
        )
    expected = list(slots(settings.model, modules))
    # A shard that cannot be read lacks all its tensors: its own line says enough.
    lines = summarise(
        checkpoint.problems or key_problems(checkpoint, expected, settings.block, ignored)
    )
    if lines:
        if modules and not any(name.startswith(module_names) for name in checkpoint.places):
            lines.insert(
                0,
                "config.json promises MTP modules that are "
                "not there: take the trunk with --trunk-only",
            )
        raise ValueError(report(folder, lines))
    return (
        checkpoint,
        settings,
        [slot for slot in expected if not slot.alias or slot.name in checkpoint.places],
    )


def require_same(checkpoint: Checkpoint) -> None:
    """Raises ValueError where a file is not what this project wrote there."""
    if problems := checkpoint.differences():
        lines = [f"{checkpoint.folder}: damaged; make it again", *problems]
        raise ValueError("\n  ".join(lines))


def key_problems(
    checkpoint: Checkpoint, expected: list[Slot], block: tuple[int, int] | None, ignored: set[str]
) -> list[tuple[str, str]]:
    """The key contract: what is missing, of a wrong shape or type, or not used. (tensor, what is
    wrong).
    """
    problems = []
    unused = checkpoint.places.keys() - ignored
    for slot in expected:
        place = checkpoint.places.get(slot.name)
        if place is None:
            if not slot.alias:  # some writers leave the two aliases of an MTP module out
                problems.append((slot.name, "missing"))
            continue
        unused.discard(slot.name)
        if place.shape != slot.shape:
            problems.append(
                (
                    slot.name,
                    f"has shape {show(place.shape)}, config.json asks for {list(slot.shape)}",
                )
            )
        elif place.dtype not in DTYPES:
            problems.append(
                (slot.name, f"has type {place.dtype}; supported are {', '.join(DTYPES)}")
            )
        elif place.dtype == "F8_E4M3":
            unused.discard(slot.name + SCALE)
            problems += _scale_problems(checkpoint, slot, block)
    # what rope_theta already says
    unused -= {name for name in unused if name.endswith("rotary_emb.inv_freq")}
    return problems + [(name, "not used by this architecture") for name in sorted(unused)]


def _scale_problems(
    checkpoint: Checkpoint, slot: Slot, block: tuple[int, int] | None
) -> list[tuple[str, str]]:
    if block is None:
        return [(slot.name, "is FP8, but config.json has no quantization_config")]
    if len(slot.shape) != 2:
        return [(slot.name, "is FP8, but no matrix")]
    scale, shape = checkpoint.places.get(slot.name + SCALE), scale_shape(slot.shape, block)
    if scale is None:
        return [(slot.name + SCALE, "missing")]
    if scale.shape != shape or scale.dtype not in ("F32", "BF16"):
        return [(slot.name + SCALE, f"is {scale.dtype} {list(scale.shape)}, not F32 {list(shape)}")]
    return []


def read_slot(checkpoint: Checkpoint, slot: Slot, block: tuple[int, int] | None) -> Tensor:
    """The tensor in its stored type; FP8 is dequantised to float32."""
    tensor = checkpoint.read(slot.name)
    if tensor.dtype == torch.float8_e4m3fn and block is not None:
        return dequantise(tensor, checkpoint.read(slot.name + SCALE), block)
    return tensor


def is_finite(tensor: Tensor) -> bool:
    """No nan, no infinity: both survive min and max. torch.isfinite takes twenty times as long on
    bfloat16.
    """
    return all(math.isfinite(value) for value in torch.aminmax(tensor))


def load_weights(
    model: DeepseekV3MTP,
    folder: Path,
    *,
    writable: Callable[[Tensor], AbstractContextManager[Any]] = nullcontext,
) -> list[str]:
    """Copies weights and router biases of a checkpoint into the model, one tensor at a time.

    MTP modules are taken as far as the model has them; others keep the values they have. Returns
    what the user should know: modules left as they were, modules not used.

    Args:
        writable: context in which a tensor can be written, for parameters that are kept in parts.

    Raises:
        ValueError: the checkpoint is damaged or does not fit the model, and nothing was copied; or
            it holds values that are not finite. Every reason is listed.
    """
    checkpoint, settings, _ = open_checkpoint(folder)
    require_same(checkpoint)
    modules, notes = fit(settings, settings.modules, model.config, model.mtp_config, folder=folder)
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    first = {
        f"{name}.{p}": m.first
        for name, m in model.named_modules()
        if isinstance(m, Experts)
        for p in m._parameters
    }
    wanted = sorted(
        (slot for slot in slots(settings.model, modules) if not slot.alias),
        key=lambda slot: slot.key,
    )
    bad: list[tuple[str, str]] = []
    for key, group in itertools.groupby(wanted, key=lambda slot: slot.key):
        if tensors[key].is_meta:  # on another pipeline stage
            continue
        with torch.no_grad(), writable(tensors[key]):
            for slot in group:
                index = slot.index
                if key in first:  # of the experts of a layer, those that are kept here
                    number, rows = index
                    index = (number - first[key], rows)
                    if not 0 <= index[0] < len(tensors[key]):
                        continue
                if is_codes(tensors[key]):
                    sound = _copy_codes(checkpoint, slot, tensors, index)
                else:
                    values = read_slot(checkpoint, slot, settings.block)
                    tensors[key][index].copy_(values)
                    sound = is_finite(values)
                if not sound:
                    bad.append((slot.name, "holds nan or infinity"))
    if bad:
        lines = summarise(bad)
        raise ValueError(report(folder, lines))
    model.start_heads(writable=writable)
    return [f"weights from {folder}", *settings.notes, *notes]


def _copy_codes(
    checkpoint: Checkpoint, slot: Slot, tensors: dict[str, Tensor], index: tuple[Any, ...]
) -> bool:
    """A matrix as it is stored, without making its numbers. index: where it is in a stack of
    experts, () of one that is none. Returns whether all of its numbers are finite.
    """
    codes = checkpoint.read(slot.name).view(torch.uint8)
    scales = checkpoint.read(slot.name + SCALE).float()
    tensors[slot.key][index].copy_(codes)
    places = tensors[slot.key + SCALE]
    if index:  # an expert, and of its rows those of one part
        expert, rows = index
        places = places[expert, rows.start // slot.shape[0]]
    places.copy_(scales)
    largest = (scales.abs() * LARGEST).to(torch.bfloat16)
    return is_finite(largest) and not bool(((codes & 127) == 127).any())  # the codes of nan


def fit(
    settings: HFSettings, stored: int, config: ModelConfig, mtp: MTPConfig, *, folder: Path
) -> tuple[int, list[str]]:
    """How many of the `stored` MTP modules a model with these sections takes, and what becomes of
    the others.

    Raises:
        ValueError: the sections make another computation of the weights; every difference is
            listed.
    """
    problems = _differences(settings.model, config)
    taken = mtp.kind.load(config, mtp, stored, settings.trunk_hidden) if mtp.depths else None
    modules = taken.modules if taken else 0
    problems += taken.problems if taken else []
    if problems:
        raise ValueError(
            "\n".join([f"{folder} does not fit this config:", *(f"  {text}" for text in problems)])
        )
    notes = []
    if modules < stored:
        notes.append(f"not used: MTP module(s) {modules + 1}..{stored} of {folder}")
    for fresh in taken.notes if taken else []:
        notes.append(f"not in {folder}, at their start: {fresh}")
    return modules, notes


def _differences(stored: ModelConfig, wanted: ModelConfig) -> list[str]:
    pairs = ((key, getattr(stored, key), getattr(wanted, key)) for key in ModelConfig.model_fields)
    return [
        f"model.{key}: {ours}, the checkpoint has {theirs}"
        for key, theirs, ours in pairs
        if theirs != ours and key not in NO_EFFECT
    ]


def load_hf(folder: str | Path) -> tuple[DeepseekV3MTP, Path | None]:
    """A checkpoint in DeepSeek-V3's layout as a model in eval mode on the CPU, ready for evaluation
    and decoding.

    Weights are as stored, bfloat16 for FP8 and float32 for float16; router biases are float32.

    Args:
        folder: config.json, *.safetensors (bfloat16, float32 or block-FP8), tokenizer.json.
    Returns:
        The model, and the path of tokenizer.json (None if there is none).
    """
    folder = Path(folder)
    checkpoint, settings, _ = open_checkpoint(folder)  # before a model of that size is made
    heads = {"mode": "sequential", "trunk_hidden": settings.trunk_hidden}
    mtp = MTPConfig(
        num_nextn_predict_layers=settings.modules, **heads if settings.modules else {"mode": "none"}
    )
    # not config.json's word for it
    wide = checkpoint.places["model.embed_tokens.weight"].dtype != "BF16"
    dtype = torch.float32 if wide else torch.bfloat16
    model = empty_model(settings.model, mtp, dtype)
    load_weights(model, folder)
    tokenizer = folder / "tokenizer.json"
    return model.eval(), tokenizer if tokenizer.is_file() else None


def mismatches(
    stored: Mapping[str, torch.Size], state: Mapping[str, Tensor]
) -> list[tuple[str, str]]:
    """How the shapes in a run's checkpoint differ from those of its config's model. (tensor, what
    is wrong).
    """
    problems = [(name, "missing") for name in state if name not in stored]
    for name, shape in stored.items():
        if name.endswith(SCALE) and name.removesuffix(SCALE) in state:
            continue  # of a weight that stayed in block-FP8
        if name not in state:
            problems.append((name, "not used by the model"))
        elif shape != state[name].shape:
            problems.append(
                (name, f"has shape {list(shape)}, config.yaml asks for {list(state[name].shape)}")
            )
    return problems


def empty_model(config: ModelConfig, mtp: MTPConfig, dtype: torch.dtype) -> DeepseekV3MTP:
    """A model on the CPU whose values are not set yet: weights of `dtype`, router biases
    float32.
    """
    model = meta_model(config, mtp)
    require_memory(model, bytes_per_value=dtype.itemsize)
    # not model.to(dtype): that would convert the router biases too
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model.to_empty(device="cpu")
