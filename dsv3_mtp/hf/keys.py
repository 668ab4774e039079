"""The key contract: every tensor of a DeepSeek-V3 checkpoint, and where it lives in memory.

Tensors have the same names on disk as in memory, except that layers 0..L-1 are the trunk and
`model.layers.{L+k-1}` is MTP module k, with two aliases, embed_tokens and shared_head.head, that
repeat the shared embedding and output head (DeepSeek-V3, README_WEIGHTS.md); and that experts are
one tensor each on disk, stacked in memory.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from dsv3_mtp.config import ModelConfig, MTPConfig
from dsv3_mtp.heads.sequential import layout_module
from dsv3_mtp.model.causal_lm import meta_model

BIAS = "mlp.gate.e_score_correction_bias"
SHOWN = 9  # lines of one report: what is wrong with a file is wrong with hundreds of tensors
# What an FP8 checkpoint quantises, as the released weights do: the projections of attention and
# feed-forward. Embedding, output head, norms, router, eh_proj and e_score_correction_bias (float32)
# stay in high precision.
QUANTISED = re.compile(r"\.(self_attn|mlp)\..*_proj\w*\.weight$")


@dataclass(frozen=True)
class Slot:
    """One tensor on disk, and the part `state[key][index]` of the model's state dict that it is."""

    name: str
    shape: tuple[int, ...]
    key: str
    index: tuple[Any, ...] = ()
    alias: bool = False  # repeats the tensor of another slot with the same key

    @property
    def is_float32(self) -> bool:
        return self.name.endswith(BIAS)

    @property
    def quantised(self) -> bool:
        """In an FP8 checkpoint."""
        return QUANTISED.search(self.name) is not None


def slots(config: ModelConfig, modules: int) -> Iterator[Slot]:
    """Every tensor of a checkpoint with `modules` MTP modules, in file order."""
    trunk = meta_model(config, MTPConfig(mode="none")).state_dict()
    with torch.device("meta"):
        module = layout_module(config).state_dict()
    for name, tensor in trunk.items():
        yield from _slots_of(name, name, tuple(tensor.shape))
    for number in range(modules):
        disk, memory = f"model.layers.{config.num_hidden_layers + number}.", f"mtp.layers.{number}."
        for alias, key in (
            ("embed_tokens", "model.embed_tokens.weight"),
            ("shared_head.head", "lm_head.weight"),
        ):
            yield Slot(f"{disk}{alias}.weight", tuple(trunk[key].shape), key, alias=True)
        for name, tensor in module.items():
            yield from _slots_of(disk + name, memory + name, tuple(tensor.shape))


def slot_count(config: ModelConfig, modules: int) -> int:
    """About how many `slots` there are: three of each expert, some dozen of each layer."""
    layers = config.num_hidden_layers + modules
    moe = layers - min(config.first_k_dense_replace, config.num_hidden_layers)
    return 3 * config.n_routed_experts * moe + 12 * layers


def _slots_of(name: str, key: str, shape: tuple[int, ...]) -> Iterator[Slot]:
    """What one tensor in memory is on disk: itself, or of stacked experts one tensor for each."""
    before, experts, stack = name.partition(".mlp.experts.")
    if not experts:
        yield Slot(name, shape, key)
        return
    names = ["gate_proj", "up_proj"] if stack == "gate_up_proj" else ["down_proj"]
    rows = shape[1] // len(names)
    for expert in range(shape[0]):
        for part, own in enumerate(names):
            index = expert, slice(part * rows, (part + 1) * rows)
            yield Slot(f"{before}{experts}{expert}.{own}.weight", (rows, shape[2]), key, index)


def summarise(problems: Iterable[tuple[str, str]]) -> list[str]:
    """(tensor, what is wrong) -> lines; a problem of a layer's experts is one line."""
    groups: dict[tuple[str, str, str], list[int]] = {}
    for name, text in problems:
        before, marker, after = name.partition(".mlp.experts.")
        number, _, rest = after.partition(".")
        if marker and number.isdecimal():
            groups.setdefault((f"{before}{marker}", f".{rest}", text), []).append(int(number))
        else:
            groups.setdefault((name, "", text), [])
    lines = []
    for (before, after, text), numbers in groups.items():
        shown = f"[{_ranges(numbers)}]" if len(numbers) > 1 else "".join(map(str, numbers))
        lines.append(f"{before}{shown}{after}: {text}")
    return lines


def report(where: object, lines: list[str]) -> str:
    """The first of many problems, and how many there are."""
    more = [f"and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
    return "\n  ".join([f"{where}: {len(lines)} problem(s)", *lines[:SHOWN], *more])


def _ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] -> "0-2, 5"."""
    starts = [n for n in sorted(numbers) if n - 1 not in numbers]
    ends = [n for n in sorted(numbers) if n + 1 not in numbers]
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))
