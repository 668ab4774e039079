"""What the heads' losses pull the trunk towards, against what the main loss does.

Yu et al. (arXiv 2001.06782) call gradients with a negative cosine conflicting. Here the two are the
gradients of the main loss and of sum_k lambda w_k / D L_k (V3 eq. 25), on the trunk's parameters
with embedding and output head.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dsv3_mtp.model.output import Batch, LossSettings
from dsv3_mtp.parallel.engine import Engine

# The heads' gradient is a difference, (main + GAIN * heads) - main: with a large factor the
# rounding of `main` weighs little in it.
GAIN = 64.0


def gradient_angle(engine: Engine, batch: Batch, loss_weights: Sequence[float]) -> dict[str, float]:
    """Cosine of the two gradients on the first micro-batch of every rank, averaged over the ranks,
    and the length of the heads' relative to the main loss's. `{}` where no gradient of the heads
    reaches the trunk.

    Two forwards and backwards beside the step: outside DeepSpeed, no `.grad` is touched, and the
    routers' loads are not counted. Needs whole parameters on every rank (config/layout.py).
    """
    model = engine.model
    tokens, documents, scored = engine.own(batch[:1])[0]
    trunk = [
        parameter
        for part in (model.model, model.lm_head)
        for parameter in part.parameters()
        if parameter.requires_grad
    ]

    def gradient(weights: tuple[float, ...]) -> Tensor:
        loss = model(tokens, documents, scored, LossSettings(weights)).loss
        found = torch.autograd.grad(loss, trunk, allow_unused=True, materialize_grads=True)
        return engine.all_reduce(torch.cat([part.float().flatten() for part in found]))

    main = gradient((0.0,) * len(loss_weights))
    heads = gradient(tuple(GAIN * weight for weight in loss_weights)).sub_(main).div_(GAIN)
    lengths = main.norm(), heads.norm()
    if not lengths[1] > 0:
        return {}
    cosine = torch.dot(main, heads) / (lengths[0] * lengths[1])
    return {
        "optim/gradient_cosine": float(cosine),
        "optim/gradient_ratio": float(lengths[1] / lengths[0]),
    }
