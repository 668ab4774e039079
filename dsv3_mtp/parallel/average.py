"""An exponential moving average of the weights in host memory (V3 3.2.2), for early looks at
decayed quality.
"""

import torch
from torch import Tensor

from dsv3_mtp.parallel.engine import Engine
from dsv3_mtp.parallel.placement import Held, held
from dsv3_mtp.runs.fragments import AVERAGE, Fragments


class WeightAverage:
    """Begins as the weights; after every optimizer step it is decay * itself + (1 - decay) *
    weights.

    Each rank averages what it writes into checkpoints, float32 masters and router biases: no
        copies, no communication.
    """

    def __init__(self, engine: Engine, decay: float):
        self.engine, self.decay = engine, decay
        self.values = {
            part.name: _weights(part).clone()
            for part in held(engine)
            if part.share[0] < part.share[1]
        }

    @torch.no_grad()
    def update(self) -> None:
        """V3 does this beside the next step; here the copy to the host is waited for."""
        for part in held(self.engine):
            if part.name in self.values:
                self.values[part.name].lerp_(_weights(part), 1 - self.decay)

    def load(self, stored: Fragments) -> list[str]:
        """The checkpoint's average; where it has none, the weights that were loaded. Says so."""
        for part in held(self.engine):
            if part.name in self.values:
                start, stop = (part.start + offset for offset in part.share)
                found = (
                    stored.read(part.name, start, stop, state=AVERAGE)
                    if stored.has(AVERAGE)
                    else _weights(part)
                )
                self.values[part.name].copy_(found)
        return (
            []
            if stored.has(AVERAGE)
            else ["train.ema_decay: the checkpoint has no average; it begins here"]
        )


def _weights(part: Held) -> Tensor:
    """(n,) what this rank writes of a tensor, float32 on the host."""
    return part.of(part.flat)[slice(*part.share)].float().cpu()
