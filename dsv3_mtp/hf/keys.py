"""The key contract: every tensor of a DeepSeek-V3 checkpoint, and where it lives in memory.

On disk layers 0..L-1 are the trunk and `model.layers.{L+k-1}` is MTP module k, with enorm, hnorm, eh_proj,
shared_head.norm and two aliases, embed_tokens and shared_head.head, that repeat the shared embedding and output head
(DeepSeek-V3, README_WEIGHTS.md). Experts are one tensor each on disk, stacked in memory.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from dsv3_mtp.config import ModelConfig

BIAS = "mlp.gate.e_score_correction_bias"
SCALE = "_scale_inv"
# What an FP8 checkpoint quantises, as the released weights do: the projections of attention and feed-forward.
# Embedding, output head, norms, router, eh_proj and e_score_correction_bias (float32) stay in high precision.
QUANTISED = (
    *(f"self_attn.{name}.weight" for name in ("q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj")),
    "self_attn.o_proj.weight",
    *(f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")),
    *(f"mlp.shared_experts.{name}_proj.weight" for name in ("gate", "up", "down")),
    *(f"mlp.experts.*.{name}_proj.weight" for name in ("gate", "up", "down")),
)


@dataclass(frozen=True)
class Slot:
    """One tensor on disk, and the part `state[key][index]` of the model's state dict that it is."""

    name: str
    shape: tuple[int, ...]
    key: str
    index: tuple[Any, ...] = ()
    quantised: bool = False  # in an FP8 checkpoint
    alias: bool = False  # repeats the tensor of another slot with the same key

    @property
    def is_float32(self) -> bool:
        return self.name.endswith(BIAS)


def slots(config: ModelConfig, modules: int) -> Iterator[Slot]:
    """Every tensor of a checkpoint with `modules` MTP modules, in file order."""
    vocabulary = (config.vocab_size, config.hidden_size)
    yield Slot("model.embed_tokens.weight", vocabulary, "model.embed_tokens.weight")
    for layer in range(config.num_hidden_layers):
        name = f"model.layers.{layer}."
        yield from _block(config, name, name, dense=layer < config.first_k_dense_replace)
    for module in range(modules):
        disk, memory = f"model.layers.{config.num_hidden_layers + module}.", f"mtp.layers.{module}."
        yield Slot(f"{disk}embed_tokens.weight", vocabulary, "model.embed_tokens.weight", alias=True)
        for name, shape in _merge_shapes(config).items():
            yield Slot(disk + name, shape, memory + name)
        yield Slot(f"{disk}shared_head.head.weight", vocabulary, "lm_head.weight", alias=True)
        yield from _block(config, disk, memory, dense=False)
    yield Slot("model.norm.weight", (config.hidden_size,), "model.norm.weight")
    yield Slot("lm_head.weight", vocabulary, "lm_head.weight")


def _merge_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    width = config.hidden_size
    norms = {name: (width,) for name in ("enorm.weight", "hnorm.weight")}
    return {**norms, "eh_proj.weight": (width, 2 * width), "shared_head.norm.weight": (width,)}


def _block(config: ModelConfig, disk: str, memory: str, dense: bool) -> Iterator[Slot]:
    """The tensors that a trunk layer and an MTP module's layer have in common."""
    width = config.hidden_size
    shapes: dict[str, tuple[int, ...]] = {"input_layernorm.weight": (width,)}
    shapes |= {f"self_attn.{name}.weight": shape for name, shape in _attention_shapes(config).items()}
    shapes["post_attention_layernorm.weight"] = (width,)
    if dense:
        shapes |= _mlp_shapes("mlp.", width, config.intermediate_size)
    else:
        shapes |= {"mlp.gate.weight": (config.n_routed_experts, width), BIAS: (config.n_routed_experts,)}
        if shared := config.n_shared_experts * config.moe_intermediate_size:
            shapes |= _mlp_shapes("mlp.shared_experts.", width, shared)
    for name, shape in shapes.items():
        yield Slot(disk + name, shape, memory + name, quantised=name in QUANTISED)
    if dense:
        return
    expert = config.moe_intermediate_size
    for number in range(config.n_routed_experts):
        for name, key, rows in (
            ("gate_proj", "gate_up_proj", slice(0, expert)),
            ("up_proj", "gate_up_proj", slice(expert, 2 * expert)),
            ("down_proj", "down_proj", slice(None)),
        ):
            shape = (width, expert) if name == "down_proj" else (expert, width)
            place = (f"{disk}mlp.experts.{number}.{name}.weight", shape, f"{memory}mlp.experts.{key}", (number, rows))
            yield Slot(*place, quantised=f"mlp.experts.*.{name}.weight" in QUANTISED)


def _attention_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    width, heads = config.hidden_size, config.num_attention_heads
    query = heads * (config.qk_nope_head_dim + config.qk_rope_head_dim)
    rank = config.q_lora_rank
    shapes: dict[str, tuple[int, ...]] = {"q_proj": (query, width)}
    if rank is not None:
        shapes = {"q_a_proj": (rank, width), "q_a_layernorm": (rank,), "q_b_proj": (query, rank)}
    return shapes | {
        "kv_a_proj_with_mqa": (config.kv_lora_rank + config.qk_rope_head_dim, width),
        "kv_a_layernorm": (config.kv_lora_rank,),
        "kv_b_proj": (heads * (config.qk_nope_head_dim + config.v_head_dim), config.kv_lora_rank),
        "o_proj": (width, heads * config.v_head_dim),
    }


def _mlp_shapes(prefix: str, width: int, inner: int) -> dict[str, tuple[int, ...]]:
    wide = {f"{prefix}{name}_proj.weight": (inner, width) for name in ("gate", "up")}
    return {**wide, f"{prefix}down_proj.weight": (width, inner)}


def summarise(problems: Iterable[tuple[str, str]]) -> list[str]:
    """(tensor, what is wrong) -> lines; the experts of one layer that share a problem share a line."""
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


def _ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] -> "0-2, 5"."""
    starts = [n for n in sorted(numbers) if n - 1 not in numbers]
    ends = [n for n in sorted(numbers) if n + 1 not in numbers]
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))
