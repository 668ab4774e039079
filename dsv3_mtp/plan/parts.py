"""The parts of a model that a plan adds up: parameters, and what is kept for backward."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from dsv3_mtp.config import Config, ModelConfig
from dsv3_mtp.model.causal_lm import DeepseekV3MTP
from dsv3_mtp.model.moe import Experts, MoE
from dsv3_mtp.precision.stored import SCALE, is_codes


class Own(NamedTuple):
    """The parameters of one module itself, which ZeRO-3 gathers together."""

    sizes: tuple[int, ...]  # elements of each
    experts: bool  # divided over expert-parallel ranks
    learned: bool
    codes: bool  # held in FP8, and made for each product

    def here(self, ranks: int) -> tuple[int, ...]:
        """`sizes` on each of the ranks that share a layer's experts."""
        return tuple(size // ranks for size in self.sizes) if self.experts else self.sizes


@dataclass(frozen=True)
class Part:
    """What a pipeline does not cut: the embedding, a trunk layer, or all that follows the trunk."""

    name: str
    dense: int  # parameters that every data rank holds
    experts: int  # parameters of routed experts, spread over expert-parallel ranks
    dense_blocks: int  # decoder layers with a dense feed-forward, each time one is computed
    moe_blocks: int
    kept: float  # elements per token that heads keep for the backward beside their blocks
    rows: int  # of a slot, that output heads score
    learned: tuple[int, int]  # `dense` and `experts` less what is frozen
    own: tuple[Own, ...]  # of each of its modules that has parameters, in their order
    codes: tuple[int, int]  # of `dense` and `experts`, what is held in FP8
    scales: tuple[int, int]  # of these codes


def parts(model: DeepseekV3MTP) -> list[Part]:
    """Embedding, every trunk layer, and last final norm, MTP modules and output head."""
    trunk, mtp = model.model, model.mtp_config
    end = nn.ModuleList([trunk.norm, model.lm_head, *([model.mtp] if mtp.depths else [])])
    cost = model.mtp.cost() if mtp.depths else None
    blocks = list(cost.blocks) if cost else []
    kept, rows = (cost.kept, 1 + cost.shared + len(cost.own)) if cost else (0, 1)
    if model.loss.objectives and model.loss.label_weight:  # each has made a gradient for every row
        kept += (rows - 1) * model.config.hidden_size
    return [
        _part("embedding", trunk.embed_tokens, []),
        *(_part(str(number), layer, [layer]) for number, layer in enumerate(trunk.layers)),
        _part("norm, MTP, head" if mtp.depths else "norm, head", end, blocks, kept, rows),
    ]


def _part(
    name: str, module: nn.Module, blocks: Sequence[nn.Module], kept: float = 0, rows: int = 0
) -> Part:
    routed = {id(p) for m in module.modules() if isinstance(m, Experts) for p in m.parameters()}
    sizes, learned, codes, scales = [0, 0], [0, 0], [0, 0], [0, 0]  # dense, experts
    for parameter in module.parameters():
        sizes[id(parameter) in routed] += parameter.numel()
        learned[id(parameter) in routed] += parameter.numel() * parameter.requires_grad
        codes[id(parameter) in routed] += parameter.numel() * is_codes(parameter)
    for layer in module.modules():
        for key, buffer in layer.named_buffers(recurse=False):
            scales[isinstance(layer, Experts)] += buffer.numel() * key.endswith(SCALE)
    own = [(list(m.parameters(recurse=False)), isinstance(m, Experts)) for m in module.modules()]
    owned = tuple(
        Own(
            tuple(p.numel() for p in few),
            experts,
            any(p.requires_grad for p in few),
            any(is_codes(p) for p in few),
        )
        for few, experts in own
        if few
    )
    moe = sum(isinstance(block.mlp, MoE) for block in blocks)
    dense = len(blocks) - moe
    pairs = [(few[0], few[1]) for few in (learned, codes, scales)]
    return Part(name, sizes[0], sizes[1], dense, moe, kept, rows, pairs[0], owned, *pairs[1:])


def on_rank(pairs: Iterable[tuple[int, int]], ranks: int) -> tuple[int, int]:
    """Of parts, counts of dense parameters and of experts -> the sums on each of the ranks that
    share a layer's experts.
    """
    dense, experts = zip(*pairs, strict=True)
    return sum(dense), sum(experts) // ranks


def activation_elements(config: Config, part: Part) -> float:
    """Elements per token that a part keeps from forward to backward, without its input."""
    model, mode = config.model, config.train.activation_checkpointing
    hidden, sliced = model.hidden_size, config.parallel.sequence_parallel_size > 1
    spread = config.parallel.expert_parallel_size > 1
    if not any(part.learned):  # of a frozen trunk, which runs without gradient
        return 0
    if part.name == "embedding":
        return hidden
    kept = part.dense_blocks * block_elements(model, mode, moe=False, spread=False, sliced=sliced)
    kept += part.moe_blocks * block_elements(model, mode, moe=True, spread=spread, sliced=sliced)
    # and gradients that the loss has made
    return kept + part.kept + hidden * part.rows


def block_elements(
    model: ModelConfig, mode: str, *, moe: bool, spread: bool, sliced: bool
) -> float:
    """`activation_elements` of one decoder layer, as its operations are fused on a GPU.

    none: the inputs of all products and of attention. selective: of these neither norms, nor what
    the up-projections and SwiGLU make (model/recompute.py). full: the input of the next layer.
    spread: experts on several ranks. sliced:
    rows on several ranks; what attention reads is then kept as exchanged, by selective as well.
    """
    hidden, top_k, width = model.hidden_size, model.num_experts_per_tok, model.moe_intermediate_size
    if mode == "full":
        return hidden
    heads, key = model.num_attention_heads, model.qk_nope_head_dim + model.qk_rope_head_dim
    queries, value = model.q_lora_rank, heads * model.v_head_dim
    latents = (
        (heads * key if queries is None else queries) + model.kv_lora_rank + model.qk_rope_head_dim
    )
    # latents, attention's output, the stream after attention and after all
    kept = latents + value + 2 * hidden
    inner = model.n_shared_experts * width if moe else model.intermediate_size
    kept += 2 * inner  # gate and up
    if moe:
        kept += top_k * 2 * width + 2 * model.n_routed_experts
        kept += top_k * hidden if spread else 0  # the rows that arrived
    kept += value if sliced else 0  # attention's output on the other side of the exchange
    if mode == "none" or sliced:
        kept += heads * key + value + (0 if queries is None else heads * key)  # key, value, query
    if mode == "none":
        kept += 2 * hidden + (queries or 0) + model.kv_lora_rank  # norms
        kept += 2 * inner  # silu(gate), and its product with up
    return kept


def backward_elements(config: Config, part: Part) -> float:
    """Elements per token that the backward of one of a part's blocks holds at once beside what its
    forward kept: gradients, and what is computed again. 0 for a part without blocks or gradients.
    """
    model, mode = config.model, config.train.activation_checkpointing
    if not any(part.learned) or not part.dense_blocks + part.moe_blocks:
        return 0
    spread = config.parallel.expert_parallel_size > 1
    hidden, top_k, width = model.hidden_size, model.num_experts_per_tok, model.moe_intermediate_size
    again = mode == "selective"
    key = model.qk_nope_head_dim + model.qk_rope_head_dim
    # query, key and value, of which the gradients are made, and made again of these
    steps = [model.num_attention_heads * (2 * key + model.v_head_dim) * (1 + again)]
    if part.dense_blocks:  # gradients of silu(gate) * up, gate and up
        steps.append((3 + again) * model.intermediate_size)
    if part.moe_blocks:  # SwiGLU's backward; then the rows, twice, and the gradients of gate and up
        steps += [top_k * (hidden + 4 * width), top_k * (2 * hidden + 2 * width)]
        if spread:  # on their way between ranks as well
            steps[-2:] = [step + 2 * top_k * hidden for step in steps[-2:]]
    repeated = 0.0
    if mode == "full":
        moe = part.moe_blocks > 0
        repeated = block_elements(model, "none", moe=moe, spread=spread, sliced=False) - hidden
    return repeated + 3 * hidden + max(steps)  # the stream's gradient, before and after the block
