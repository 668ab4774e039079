"""Choosing tokens, and deciding which drafts stand. One verifier for every kind of head."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dsv3_mtp.ops import c, c_decode, choice


@dataclass(frozen=True)
class TokenSampler:
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

    @property
    def truncates(self) -> bool:
        return self.top_k is not None or self.top_p < 1

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
            return largest(logits), None
        probability = self.probabilities(logits)
        return self.pick(probability), probability

    def pick(self, probability: Tensor) -> Tensor:
        """(B, V), not necessarily normalised -> (B,) drawn tokens; -1 of numbers that are not
        finite, of which torch.multinomial would end a GPU's process.
        """
        sound = probability.sum(-1).isfinite()
        weights = torch.where(sound[:, None], probability, 1.0)
        token = torch.multinomial(weights, 1, generator=self.generator).squeeze(1)
        return torch.where(sound, token, -1)

    def verify(
        self,
        logits: Tensor,
        drafts: Tensor,
        draft_probability: Tensor | None,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """When sampling, how many drafts of each row stand, and the token after them.

        Draft d stands with probability min(1, p(d)/q(d)); the first that falls is replaced by a
        draw from (p - q)+ (arXiv 2211.17192, 2302.01318). That gives exactly the main model's own
        distribution, whatever the drafts.

        Args:
            logits: (B, K+1, V) of the main model at the last known token and the K drafts.
            drafts: (B, K); draft_probability: (B, K, V).
            lengths: (B,) how many of its drafts a row puts to the test; None: all of them.
        Returns:
            accepted (B,) in 0..K, and next (B,).
        """
        count = drafts.shape[1]
        tested = torch.ones_like(drafts, dtype=torch.bool)
        if lengths is not None:
            tested = torch.arange(count, device=drafts.device) < lengths[:, None]
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
            accepted = ((coin * q_draft < p_draft) & tested).cumprod(1).sum(1)
            # behind the last draft of a row: a draw from p
            q = torch.cat([draft_probability * tested[..., None], torch.zeros_like(p[:, :1])], 1)
            residual = (p - q)[rows, accepted].clamp(min=0)  # (B, V)
            empty = residual.sum(-1, keepdim=True) == 0  # p and q differ by rounding only
            return accepted, self.pick(torch.where(empty, p[rows, accepted], residual))
        return accepted, self.pick(p[:, 0])


def largest(logits: Tensor) -> Tensor:
    """(N, V) -> (N,), the most likely token. Torch's argmax takes as long as C does for a layer.

    A row whose largest number is not finite has none: in C that is a ValueError, with torch's
    operations, where a look at the numbers would wait for a GPU, its token is -1.
    """
    if choice.kernels(logits) is c and logits.is_contiguous():
        return c_decode.largest(logits)
    value, token = logits.max(-1)
    return torch.where(value.isfinite(), token, -1)


def agreeing(best: list[int], drafts: list[int]) -> int:
    """Greedy: how many drafts stand, the longest prefix that equals the main model's argmax.

    best: K+1 tokens, at the last known one and at each draft; drafts: K or fewer.
    """
    pairs = enumerate(zip(drafts, best, strict=False))
    return next((k for k, (draft, token) in pairs if draft != token), len(drafts))


class DraftSampler:
    """How the drafts of one step are drawn: depth by depth, as a `TokenSampler` draws them, and how
    many each row has.

    A row stops before depth k where q_k's top probability is below `threshold` (greedy: that at
    temperature 1), or a confidence of the head. Neither has seen d_k: with a rule that looks at the
    draft which it drops, the output would no longer have the main model's distribution.
    """

    def __init__(
        self,
        sampler: TokenSampler,
        *,
        threshold: float = 0.0,
        among: Tensor | None = None,
        vocab: int = 0,
    ):
        """threshold: 0: nothing stops; among: (N,) the ids, out of `vocab`, that drafts are drawn
        among; None: all.
        """
        self.sampler, self.threshold, self.among, self.vocab = sampler, threshold, among, vocab
        self.greedy = sampler.greedy
        self._lengths: Tensor | int = 0
        self._going: Tensor | bool = True

    @property
    def lengths(self) -> Tensor | None:
        """(B,) drafts of each row so far; None: no threshold, all rows have as many."""
        return self._lengths if isinstance(self._lengths, Tensor) else None

    @property
    def ended(self) -> bool:
        """Every row has stopped: the depths after this one need not be computed."""
        return isinstance(self._going, Tensor) and not bool(self._going.any())

    def draw(
        self, logits: Tensor, confidence: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """As `TokenSampler.draw`, of the next depth.

        logits: (B, V), or of the tokens of `among` alone (`Decoder.draft_logits`); confidence:
        (B,) in [0, 1], a head's estimate of its acceptance, instead of the top probability.
        """
        if self.among is not None and logits.shape[-1] != len(self.among):
            raise ValueError(
                f"logits: of {logits.shape[-1]} tokens, but {len(self.among)} can be drafted; "
                "a drafter passes logits of its own through Decoder.narrow"
            )
        probability = None if self.greedy else self.sampler.probabilities(logits)
        if self.threshold > 0:
            if confidence is None:
                known = logits.float().softmax(-1) if probability is None else probability
                confidence = known.amax(-1)
            self._going = (confidence >= self.threshold) & self._going
            self._lengths = self._going.long() + self._lengths
        tokens = largest(logits) if probability is None else self.sampler.pick(probability)
        # a row that has no token may draft any: what becomes known is the main model's
        tokens = tokens.clamp(min=0)
        if self.among is None:
            return tokens, probability
        if probability is not None:
            wide = probability.new_zeros(len(probability), self.vocab)
            probability = wide.index_copy_(1, self.among, probability)
        return self.among[tokens], probability
