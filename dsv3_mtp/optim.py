"""AdamW as DeepSeek-V3 section 4.2 uses it."""

from typing import Any

import torch
from torch import nn

from dsv3_mtp.config import OptimConfig


def build_optimizer(model: nn.Module, optim: OptimConfig) -> torch.optim.AdamW:
    """Fused AdamW; matrices decay, vectors (the norms) do not. The learning rate is set anew at every step."""
    matrices = [p for p in model.parameters() if p.requires_grad and p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.requires_grad and p.ndim < 2]
    optimizer = torch.optim.AdamW([{"params": matrices}, {"params": vectors}], lr=optim.lr, fused=True)
    set_hyperparameters(optimizer.param_groups, optim)
    return optimizer


def set_hyperparameters(param_groups: list[dict[str, Any]], optim: OptimConfig) -> None:
    """Of a new optimizer, and again after a checkpoint brought its own back: the config decides."""
    for group, decay in zip(param_groups, (optim.weight_decay, 0.0), strict=True):
        group.update(betas=(optim.betas[0], optim.betas[1]), eps=optim.eps, weight_decay=decay)
