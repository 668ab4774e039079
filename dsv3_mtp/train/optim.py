"""AdamW as V3 4.2 uses it, if asked with its moments in bfloat16 (V3 3.3.3)."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from dsv3_mtp.config import OptimConfig
from dsv3_mtp.model.layers import RMSNorm

# elements whose moments are float32 at one time: ZeRO gives all of a rank's weights as one tensor
CHUNK = 1 << 24


class BF16MomentsAdamW(torch.optim.AdamW):
    """torch's fused AdamW on float32 weights and gradients, its two moments rounded to bfloat16
    between steps.

    The update itself reads the moments before they are rounded. Rounding to nearest is enough for
    V3's beta2 = 0.95: a gradient moves the second moment by several bfloat16 units. With 0.999 most
    steps would be rounded away.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)

    def _update(self, parameter: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state, (beta1, beta2) = self.state[parameter], group["betas"]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter, dtype=torch.bfloat16)
            state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=torch.bfloat16)
        settings = {
            name: group[name]
            for name in ("lr", "weight_decay", "eps", "fused", "amsgrad", "maximize")
        }
        tensors = (parameter, grad, state["exp_avg"], state["exp_avg_sq"])
        for weights, gradient, first, second in zip(
            *(x.reshape(-1).split(CHUNK) for x in tensors), strict=True
        ):
            wide = first.float(), second.float()
            steps = [state["step"].clone()]  # it counts in place
            lists: Any = [[weights], [gradient], [wide[0]], [wide[1]], [], steps]
            adamw(*lists, beta1=beta1, beta2=beta2, **settings)
            first.copy_(wide[0])
            second.copy_(wide[1])
        state["step"] += 1


def build_optimizer(
    model: nn.Module, optim: OptimConfig, *, apart: nn.Module | None = None
) -> torch.optim.AdamW:
    """Fused AdamW; matrices decay, vectors (the norms) do not. The learning rate is set anew at
    every step.

    apart: the heads, where they are clipped apart (parallel/clip.py). Their parameters then have
        groups of their own, behind the trunk's; every group says its `side`.
    """
    norms = {
        id(p)
        for module in model.modules()
        if isinstance(module, RMSNorm)
        for p in module.parameters()
    }
    heads = {id(p) for p in apart.parameters()} if apart is not None else set()
    groups: dict[tuple[str, str], dict[str, Any]] = {
        ("trunk", name): {"name": name, "params": []} for name in ("matrices", "vectors")
    }
    for parameter in model.parameters():
        # Expert parallelism marks its parameters with the ranks that hold copies; DeepSpeed wants
        # them apart, by name.
        shared = getattr(parameter, "group_name", None)
        name = shared or ("vectors" if id(parameter) in norms else "matrices")
        side = "mtp" if id(parameter) in heads else "trunk"
        if parameter.requires_grad and not parameter.is_meta:  # meta: on another pipeline stage
            new: dict[str, Any] = {"name": name, "params": []}
            new |= {"moe": True} if shared else {}
            groups.setdefault((side, name), new)["params"].append(parameter)
    for (side, name), group in groups.items():
        group["weight_decay"] = 0.0 if name == "vectors" else optim.weight_decay
        if apart is not None:
            group["side"] = side
    ordered = [groups[key] for key in sorted(groups, key=lambda key: key[0] == "mtp")]
    kind = BF16MomentsAdamW if optim.moments == "bfloat16" else torch.optim.AdamW
    return kind(ordered, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True)
