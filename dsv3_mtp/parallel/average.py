"""An exponential moving average of the weights in host memory (V3 3.2.2)."""

import torch
from torch import Tensor

from dsv3_mtp.files.fragments import AVERAGE, Fragments
from dsv3_mtp.parallel.engine import Engine
from dsv3_mtp.parallel.placement import TensorShard, tensor_shards


class WeightAverage:
    """Begins as the weights; after every optimizer step it is decay * itself + (1 - decay) *
    weights.

    Each rank averages only what it writes into checkpoints, float32 masters and router biases.
    Nothing is averaged twice and nothing is sent. A frozen trunk is its own average, and is not
    kept again.
    """

    def __init__(self, engine: Engine, decay: float):
        self.engine, self.decay = engine, decay
        frozen = engine.model.frozen
        self.values = {
            part.name: _weights(part).clone()
            for part in tensor_shards(engine)
            if part.share[0] < part.share[1] and (part.name.startswith("mtp.") or not frozen)
        }

    @torch.no_grad()
    def update(self) -> None:
        """Waits for the copy to the host, which V3 overlaps with the next step."""
        for part in tensor_shards(self.engine):
            if part.name in self.values:
                self.values[part.name].lerp_(_weights(part), 1 - self.decay)

    def load(self, stored: Fragments) -> list[str]:
        """The checkpoint's average; where it has none, the weights that were loaded. Says so."""
        for part in tensor_shards(self.engine):
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


def _weights(part: TensorShard) -> Tensor:
    """(n,) what this rank writes of a tensor, float32 on the host."""
    return part.of(part.flat)[slice(*part.share)].float().cpu()
