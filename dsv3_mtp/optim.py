"""AdamW as DeepSeek-V3 section 4.2 uses it."""

from typing import Any

import torch
from torch import nn

from dsv3_mtp.config import OptimConfig
from dsv3_mtp.model.layers import RMSNorm


def build_optimizer(model: nn.Module, optim: OptimConfig) -> torch.optim.AdamW:
    """Fused AdamW; matrices decay, vectors (the norms) do not. The learning rate is set anew at every step."""
    norms = {id(p) for module in model.modules() if isinstance(module, RMSNorm) for p in module.parameters()}
    groups: dict[str, dict[str, Any]] = {name: {"name": name, "params": []} for name in ("matrices", "vectors")}
    for parameter in model.parameters():
        # Expert parallelism marks its parameters with the ranks that hold copies; DeepSpeed wants them apart, by name.
        shared = getattr(parameter, "group_name", None)
        name = shared or ("vectors" if id(parameter) in norms else "matrices")
        if parameter.requires_grad and not parameter.is_meta:  # meta: on another pipeline stage
            groups.setdefault(name, {"name": name, "params": [], "moe": True})["params"].append(parameter)
    for group in groups.values():
        group["weight_decay"] = 0.0 if group["name"] == "vectors" else optim.weight_decay
    betas = (optim.betas[0], optim.betas[1])
    return torch.optim.AdamW(list(groups.values()), lr=optim.lr, betas=betas, eps=optim.eps, fused=True)
