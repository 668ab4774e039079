"""Training steps by torch alone, to compare with: no DeepSpeed, stages, micro-batches or set-up of
the package.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from dsv3_mtp.config import Config, schedules
from dsv3_mtp.data.sampler import Sampler
from dsv3_mtp.data.source import open_source
from dsv3_mtp.model.causal_lm import DeepseekV3MTP
from dsv3_mtp.model.output import LossSettings, MTPOutput
from dsv3_mtp.train.validation import to_device


class PlainStep(NamedTuple):
    size: int  # sequences
    out: MTPOutput
    grads: dict[str, Tensor]  # before clipping
    norm: float


def plain_steps(model: DeepseekV3MTP, config: Config, steps: int) -> Iterator[PlainStep]:
    """Trains the model on whole batches with torch's AdamW and clipping."""
    groups = [
        {
            "params": [p for p in model.parameters() if p.ndim > 1],
            "weight_decay": config.optim.weight_decay,
        }
    ]
    groups += [{"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=config.optim.betas, eps=config.optim.eps)
    source, total = open_source(config.data.train, "train"), config.train.total_tokens  # type: ignore[arg-type]
    sampler = Sampler([source], seq_len=16, lookahead=1 + config.mtp.depths, seed=config.run.seed)
    tokens = 0
    for _ in range(steps):
        progress = tokens / total
        size = schedules.batch_size(config.train, progress, config.train.micro_batch_size)
        tokens += size * 16
        for group in optimizer.param_groups:
            group["lr"] = schedules.learning_rate(config.optim, min(tokens / total, 1.0))
        (batch,) = sampler.next_batch(size)
        weights = schedules.depth_loss_weights(config.mtp, progress)
        inputs = to_device(*batch, config=config, device=torch.device("cpu"))[:2]
        settings = LossSettings(weights, config.train.balance_loss_weight)
        out = model(*inputs, settings=settings)
        optimizer.zero_grad()
        out.loss.backward()
        grads = {name: p.grad.clone() for name, p in model.named_parameters()}  # type: ignore[union-attr]
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.grad_clip)
        optimizer.step()
        model.update_router_bias(out.load, schedules.bias_update_speed(config.train, progress))
        yield PlainStep(size, out, grads, norm.item())
