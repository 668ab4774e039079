"""Choosing tokens, and deciding which drafts stand. One verifier for every kind of head."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampler:
    """How the next token is chosen from logits. Temperature 0 is greedy; truncation comes after the
    temperature.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    generator: torch.Generator | None = None

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    def probabilities(self, logits: Tensor) -> Tensor:
        """(..., V) logits -> float32 probabilities after temperature, top-k, then top-p,
        renormalised.

        top-k keeps the k largest (and what ties with the k-th); top-p the smallest set of most
        likely tokens whose probability reaches p.
        """
        scaled = logits.to(torch.promote_types(logits.dtype, torch.float32)) / self.temperature
        if self.top_k is not None and self.top_k < scaled.shape[-1]:
            least = scaled.topk(self.top_k, dim=-1).values[..., -1:]
            scaled = scaled.masked_fill(scaled < least, float("-inf"))
        probability = scaled.softmax(-1)
        if self.top_p < 1:
            ordered, order = probability.sort(dim=-1, descending=True)
            # the tokens before it reach p already
            beyond = ordered.cumsum(-1) - ordered >= self.top_p
            probability = torch.zeros_like(probability).scatter(
                -1, order, ordered.masked_fill(beyond, 0.0)
            )
            probability = probability / probability.sum(-1, keepdim=True)
        return probability

    def draw(self, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        """(B, V) logits -> tokens (B,), and when sampling the probabilities (B, V) that they were
        drawn from.
        """
        if self.greedy:
            return logits.argmax(-1), None
        probability = self.probabilities(logits)
        return self.pick(probability), probability

    def pick(self, probability: Tensor) -> Tensor:
        """(B, V), not necessarily normalised -> (B,) drawn tokens."""
        return torch.multinomial(probability, 1, generator=self.generator).squeeze(1)

    def verify(
        self, logits: Tensor, drafts: Tensor, draft_probability: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """How many drafts of each row stand, and the token after them.

        Greedy: the longest prefix that equals the main model's argmax. Sampling: draft d stands
        with probability min(1, p(d)/q(d)); the first that falls is replaced by a draw from (p - q)+
        (arXiv 2211.17192, 2302.01318). Both give exactly the main model's own distribution,
        whatever the drafts.

        Args:
            logits: (B, K+1, V) of the main model at the last known token and the K drafts.
            drafts: (B, K); draft_probability: (B, K, V), None when greedy.
        Returns:
            accepted (B,) in 0..K, and next (B,).
        """
        count = drafts.shape[1]
        if self.greedy:
            best = logits.argmax(-1)  # (B, K+1)
            accepted = (best[:, :count] == drafts).cumprod(1).sum(1)
            return accepted, best.gather(1, accepted[:, None]).squeeze(1)
        p = self.probabilities(logits)  # (B, K+1, V)
        rows = torch.arange(len(p), device=p.device)
        accepted = torch.zeros(len(p), dtype=torch.long, device=p.device)
        if draft_probability is not None and count:
            p_draft, q_draft = (
                x.gather(2, drafts[..., None]).squeeze(2) for x in (p[:, :count], draft_probability)
            )
            coin = torch.rand(
                drafts.shape, generator=self.generator, device=p.device, dtype=p.dtype
            )
            accepted = (coin * q_draft < p_draft).cumprod(1).sum(1)
            # after K accepted: a draw from p
            q = torch.cat([draft_probability, torch.zeros_like(p[:, :1])], dim=1)
            residual = (p - q)[rows, accepted].clamp(min=0)  # (B, V)
            empty = residual.sum(-1, keepdim=True) == 0  # p and q differ by rounding only
            return accepted, self.pick(torch.where(empty, p[rows, accepted], residual))
        return accepted, self.pick(p[:, 0])
