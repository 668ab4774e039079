"""Embedding, decoder layers and final norm: what all heads share."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from dsv3_mtp.config import ModelConfig
from dsv3_mtp.model.block import DecoderLayer
from dsv3_mtp.model.layers import RMSNorm
from dsv3_mtp.model.moe import RouterStats
from dsv3_mtp.model.states import TrunkStates


class Trunk(nn.Module):
    """Embedding, decoder layers, final norm."""

    def __init__(self, config: ModelConfig, kept: frozenset[int] = frozenset()):
        """kept: numbers of the layers whose outputs heads read."""
        super().__init__()
        # Not the constructor: it draws numbers, and on the meta device that imports torch's
        # compiler for seconds.
        weight = torch.empty(config.vocab_size, config.hidden_size)
        self.embed_tokens = nn.Embedding.from_pretrained(weight, freeze=False)
        self.layers = nn.ModuleList(
            DecoderLayer(config, layer) for layer in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.kept = kept

    def forward(
        self, x: Tensor, angles: Tensor, mask: Tensor | None
    ) -> tuple[TrunkStates, list[RouterStats]]:
        """x: (B, T, C) embeddings."""
        outputs: dict[int, Tensor] = {}
        last_input, x, stats = run_layers(self.layers, x, angles, mask, outputs)
        kept = {layer: outputs[layer] for layer in self.kept}
        return TrunkStates(last_input, x, self.norm(x), kept), stats


def run_layers(
    layers: Iterable[nn.Module],
    x: Tensor,
    angles: Tensor,
    mask: Tensor | None,
    outputs: dict[int, Tensor] | None = None,
) -> tuple[Tensor, Tensor, list[RouterStats]]:
    """Trunk layers, one after another: input of the last of them, output, stats of their routers.
    x: (B, T, C). outputs: gets the output of each, by its number among them.
    """
    stats, last_input = [], x
    for number, layer in enumerate(layers):
        last_input = x
        x, routed = layer(x, angles, mask)
        if routed is not None:
            stats.append(routed)
        if outputs is not None:
            outputs[number] = x
    return last_input, x, stats
