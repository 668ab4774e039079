"""What drafts are worth along real text, by the drafter itself: also those beyond D, for which
there is no teacher-forced forward, because a module drafts again from what it said.

The tokens between are the text's, whatever the drafter would have drawn.
"""

from typing import Any

import torch
from torch import Tensor

from dsv3_mtp.decode.cache import CacheSlots
from dsv3_mtp.decode.decoder import Decoder
from dsv3_mtp.decode.draft import Drafter
from dsv3_mtp.decode.generate import DecodingRows
from dsv3_mtp.decode.generation import Settings
from dsv3_mtp.decode.sample import DraftSampler, TokenSampler


class ForcedSampler(DraftSampler):
    """Says what the text says next, and keeps the distributions it would have drawn from."""

    def __init__(self, text: Tensor, sampler: TokenSampler, **among: Any):
        """text: (B, K) tokens; sampler: of a temperature > 0."""
        super().__init__(sampler, **among)
        self.text = text
        self.seen: list[Tensor] = []  # (B, V) of each draft

    def draw(
        self, logits: Tensor, confidence: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        _, probability = super().draw(logits, confidence)
        assert probability is not None
        self.seen.append(probability)
        return self.text[:, len(self.seen) - 1], probability


@torch.inference_mode()
def forced_overlap(decoder: Decoder, tokens: Tensor, first: int, settings: Settings) -> Tensor:
    """sum_v min(p(v), q_k(v)) of drafts k = 1..K of the tokens `first` + k, (B, K).

    Args:
        decoder: of the model, and of the tokens that drafts are among.
        tokens: (B, L), of which those up to `first` are known and those up to first + K are forced.
        first: >= 1, at most L - 1 - K.
        settings: draft_depth K, which the heads have to reach; temperature > 0; recycle.
    """
    depth, (rows, length) = settings.draft_depth, tokens.shape
    if settings.temperature <= 0:
        raise ValueError(f"temperature: must be > 0 (got {settings.temperature})")
    if not 1 <= first <= length - 1 - depth:
        raise ValueError(f"first: must be in 1..{length - 1 - depth} (got {first})")
    model = decoder.model
    slots = CacheSlots(model, first + 3 * (depth + 1) + Drafter.LAG)
    batch = DecodingRows(decoder, slots, tokens[:, :first].tolist(), settings)
    assert batch.drafter is not None
    sampler = TokenSampler(settings.temperature)
    batch.prefill(sampler)
    batch.ids[:, first] = tokens[:, first]
    among = {"among": decoder.draft_ids, "vocab": model.config.vocab_size}
    forced = ForcedSampler(tokens[:, first + 1 :], sampler, **among)
    batch.drafter.draft(batch.ids, batch.last, depth, forced)
    states = batch.forward(batch.last, depth)
    p = sampler.probabilities(decoder.logits(states.post_norm)).view(rows, depth, -1)
    return torch.minimum(p, torch.stack(forced.seen, 1)).sum(-1)
