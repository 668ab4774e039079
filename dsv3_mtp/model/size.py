"""What a model costs: parameters, active ones, training FLOPs. It may be on the meta device."""

import os
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from dsv3_mtp.config import ModelConfig
from dsv3_mtp.model.causal_lm import DeepseekV3MTP
from dsv3_mtp.model.moe import Experts
from dsv3_mtp.precision.stored import is_codes


@dataclass(frozen=True)
class ModelSize:
    """Parameter counts and training cost, checked against the paper in tests/model."""

    total: int  # trunk, embedding, output head
    active: int  # of these, used per token: K of E routed experts
    embedding: int  # a lookup: no matmul FLOPs
    mtp_total: int  # unique to the MTP heads: shared embedding and output head not counted
    mtp_active: int
    flops_per_token: (
        float  # forward + backward of one training token with all depths, causal attention
    )


def model_size(model: DeepseekV3MTP, seq_len: int) -> ModelSize:
    """6 FLOPs per active matmul weight and token, plus causal attention 6 H (qk + v) T/2 per layer.

    A third of it for a frozen trunk, which has no backward. An output projection of the heads has
    half of a backward where its weight, or what it reads, gets no gradient: with a frozen trunk,
    and by mtp.detach.
    """
    config, mtp = model.config, model.mtp_config
    count = partial(_total_and_active, config)

    heads = nn.ModuleList([model.mtp]) if mtp.depths else nn.ModuleList()
    mtp_total, mtp_active = count(heads)
    total, active = count(nn.ModuleList([model.model, model.lm_head]))
    embedding = model.model.embed_tokens.weight.numel()
    learns = model.lm_head.weight.requires_grad
    blocks = config.num_hidden_layers / (1 if learns else 3)
    flops = (6 if learns else 2) * (active - embedding) + blocks * _attention_flops(config, seq_len)
    if mtp.depths:
        flops += _head_flops(model, seq_len)
    return ModelSize(total, active, embedding, mtp_total, mtp_active, flops)


def _head_flops(model: DeepseekV3MTP, seq_len: int) -> float:
    """Of what the heads say that they compute (heads/base.py: `cost`)."""
    config, mtp, cost = model.config, model.mtp_config, model.mtp.cost()
    flops = (len(cost.blocks) + cost.attentions) * _attention_flops(config, seq_len)
    flops += sum(6 * _total_and_active(config, part)[1] for part in (*cost.blocks, *cost.products))
    learns = model.lm_head.weight.requires_grad
    into = learns and mtp.detach != "all" and (mtp.detach == "none" or mtp.reads_tokens)
    of_trunk = learns and mtp.detach == "none"
    for parts, gradient in ((cost.first, into), (cost.first_of_trunk, of_trunk)):
        flops += sum((4 + 2 * gradient) * _total_and_active(config, part)[1] for part in parts)
    into_rows = not cost.rows_of_trunk or mtp.detach == "none"  # there is a gradient
    learns = learns and mtp.detach != "all"
    size = model.lm_head.weight.numel()
    own = sum(_total_and_active(config, output)[1] for output in cost.own)
    # logits with their backward, of the rows of all depths
    rows = cost.shared * (2 + 2 * into_rows + 2 * learns) * size + (4 + 2 * into_rows) * own
    # The label's cross-entropy is computed in any case. Other objectives, and terms that read the
    # overlap, make the logits anew, and those of the teacher.
    flops += rows if model.loss.label_weight else 2 * (cost.shared * size + own)
    return flops + (rows + 2 * size if model.loss.compared else 0)


def layer_flops(model: DeepseekV3MTP, seq_len: int) -> list[float]:
    """`flops_per_token` by place: every trunk layer, and last all that follows them."""
    attention = _attention_flops(model.config, seq_len)
    trunk = [
        6 * _total_and_active(model.config, layer)[1] + attention for layer in model.model.layers
    ]
    return [*trunk, model_size(model, seq_len).flops_per_token - sum(trunk)]


def _total_and_active(config: ModelConfig, part: nn.Module) -> tuple[int, int]:
    """Parameters of a part of the model: all, and those used per token."""
    total = sum(p.numel() for p in part.parameters())
    experts = sum(
        p.numel() for m in part.modules() if isinstance(m, Experts) for p in m.parameters()
    )
    return total, total - round(
        experts * (1 - config.num_experts_per_tok / config.n_routed_experts)
    )


def _attention_flops(config: ModelConfig, seq_len: int) -> float:
    """Of one layer, forward and backward, per token: causal, so half of the square."""
    width = config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim
    return 6 * config.num_attention_heads * width * seq_len / 2


def require_memory(
    model: nn.Module, *, bytes_per_value: float, frozen: float | None = None, ranks: int = 1
) -> None:
    """Raises ValueError where the weights of a model, shared by all ranks at best, are more than
    the memory of this machine and its GPUs; the model may be on the meta device. frozen: bytes of a
    value that does not learn, None: as of one that does; codes are bytes in any case.
    """
    kept = bytes_per_value if frozen is None else frozen
    values = sum(p.numel() for p in model.parameters())
    each = (
        (p.numel(), 1 if is_codes(p) else bytes_per_value if p.requires_grad else kept)
        for p in model.parameters()
    )
    needed = sum(size * width for size, width in each) / ranks
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    there += sum(
        torch.cuda.get_device_properties(n).total_memory for n in range(torch.cuda.device_count())
    )
    if needed > there:
        raise ValueError(
            f"the model has {values:,} parameters, {needed / 2**30:,.0f} GiB on each of {ranks} "
            f"rank(s) at the least; this machine has {there / 2**30:,.0f} GiB"
        )
