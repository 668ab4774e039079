"""A block drafter after DSpark (arXiv 2607.05147; github.com/deepseek-ai/DeepSpec): one pass gives
D drafts, which a low-rank bias by the token before each of them ties together.

Slot i is an anchor: the trunk has read up to t_i, and t_{i+1} is known. Depth k is a row

    x_k = Emb(t_{i+1}) + query_k

that goes through `block_layers` decoder layers with dense feed-forwards. They attend to the trunk
alone: keys and values of slots 0..i come from c = hidden_norm(fc(states of the trunk)). Then

    logits_k = lm_head(norm(x_k)) + markov_w2 markov_w1[t_{i+k}]
    confidence_k = sigmoid(confidence_head([norm(x_k) ; markov_w1[t_{i+k}]]))

t_{i+k} is the neighbouring draft while drafting. The confidence learns the overlap of q_k with the
main model, detached, by binary cross-entropy; it has not seen d_k, so that --draft-threshold may
use it. As there, depths weigh exp(-(k-1)/4) (`mtp.depth_weights`, beta = exp(-1/4) = 0.7788) with
one denominator for the whole block, the objective is {ce: 0.1, tv: 1.8} (its L1 is 2 tv), and no
gradient reaches the trunk (`mtp.detach: all`): configs/heads/dspark.yaml.

What differs: every slot is an anchor (there 512 sampled ones of 4096); the rows of a block do not
attend to each other: all of them are given t_{i+1} itself instead of reading it in row 1; and each
has a learnt query at the anchor's position instead of one mask token at its own.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from dsv3_mtp.config import ModelConfig, MTPConfig
from dsv3_mtp.config.schedules import depth_shares
from dsv3_mtp.config.section import Count, Integer, NotNegative, Section
from dsv3_mtp.decode.cache import Window
from dsv3_mtp.decode.draft import Drafter, write_drafts
from dsv3_mtp.decode.layers import Attention, Dense, Norm
from dsv3_mtp.decode.sample import DraftSampler
from dsv3_mtp.heads.base import Cost, Head
from dsv3_mtp.model.attention import MLA
from dsv3_mtp.model.block import DecoderLayer
from dsv3_mtp.model.layers import RMSNorm
from dsv3_mtp.model.states import HeadInputs, HeadOutput, HeadRows, Output, Scores, TrunkStates
from dsv3_mtp.ops.attention import attend
from dsv3_mtp.ops.compute import given
from dsv3_mtp.ops.recompute import recomputed


class DSparkOptions(Section):
    """Keys of `mtp:` with mode dspark."""

    block_layers: Count = 1
    """Decoder layers of the drafter (DSpark: 5 for Qwen3-4B)."""
    target_layer_ids: tuple[Annotated[Integer, Field(ge=0)], ...] = ()
    """Trunk layers whose outputs it reads (DSpark: 1, 9, 17, 25, 33 of 36); (): the trunk's own."""
    markov_rank: Count = 16
    """Rank of the bias by the token before a draft (DSpark: 256)."""
    confidence: NotNegative = 1.0
    """Weight of the confidence's loss, beside lambda (DSpark: 1); 0: there is no confidence."""


class ContextMLA(MLA):
    """Attention of the rows of all depths to the trunk's slots."""

    def forward(self, x: Tensor, angles: Tensor, first: Tensor | None) -> Tensor:
        """x: (1+D, B, T, C), the context and the rows -> (D, B, T, C)."""
        latent, k_rope = self.keys(x[0])
        kv = recomputed(self.kv_b_proj, recomputed(self.kv_a_layernorm, latent)).unflatten(
            -1, (self.heads, -1)
        )
        mixed = [
            attend(self.queries(row), kv, k_rope, angles, self.scale, first, core=self.core)
            for row in x[1:]
        ]
        return self.o_proj(torch.stack(mixed))


class ContextLayer(DecoderLayer):
    """A decoder layer, with a dense feed-forward, that hands its context on as it is."""

    def __init__(self, config: ModelConfig):
        super().__init__(config, layer=-1)  # dense, as a layer before layer 0 would be
        self.self_attn = ContextMLA(config)

    def compute(self, x: Tensor, angles: Tensor, mask: Tensor | None) -> tuple[Tensor, None]:
        """x: (1+D, B, T, C), the context and the rows -> the same, and no router's stats."""
        attended = self.self_attn(recomputed(self.input_layernorm, x), angles, mask)
        rows, normed = self.post_attention_layernorm(x[1:], attended)
        return torch.cat([x[:1], rows + self.mlp(normed)]), None


class MarkovBias(Output):
    """logits = row @ head + low @ w2, low (n, r) = w1[the token before the target]."""

    def __init__(self, config: ModelConfig, rank: int):
        super().__init__()
        self.w2 = nn.Parameter(torch.empty(config.vocab_size, rank))

    def logits(self, inputs: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
        (row, low), (head, w2) = inputs, weights
        return F.linear(row, head) + F.linear(low, w2)


class DSpark(Head):
    """D drafts in one pass, tied together by a bias of the token before, each with a confidence."""

    name = "dspark"
    Options = DSparkOptions
    options: DSparkOptions

    def __init__(self, config: ModelConfig, mtp: MTPConfig):
        super().__init__(config, mtp)
        hidden, rank = config.hidden_size, self.options.markov_rank
        read = max(len(self.options.target_layer_ids), 1)
        self.fc = given().linear("eh_proj", read * hidden, hidden)
        self.hidden_norm = RMSNorm(hidden, config.rms_norm_eps)
        self.query = nn.Embedding.from_pretrained(torch.empty(mtp.depths, hidden), freeze=False)
        self.layers = nn.ModuleList(ContextLayer(config) for _ in range(self.options.block_layers))
        self.norm = RMSNorm(hidden, config.rms_norm_eps)
        w1 = torch.empty(config.vocab_size, rank)
        self.markov_w1 = nn.Embedding.from_pretrained(w1, freeze=False)
        self.markov_w2 = MarkovBias(config, rank)
        self.confidence_head = nn.Linear(hidden + rank, 1) if self.options.confidence else None

    @classmethod
    def reads(cls, mtp: MTPConfig) -> frozenset[str | int]:
        return frozenset(mtp.options.target_layer_ids or ["pre_norm"])

    @classmethod
    def horizon(cls, mtp: MTPConfig, depth: int) -> int:
        return depth

    def fuse(self, trunk: TrunkStates) -> Tensor:
        """(.., C): what the layers attend to."""
        ids = self.options.target_layer_ids
        states = [trunk.layers[j] for j in ids] or [trunk.pre_norm]
        return self.hidden_norm(self.fc(torch.cat(states, -1)))

    def forward(self, inputs: HeadInputs) -> HeadOutput:
        depths = range(1, 1 + self.mtp.depths)
        numbers = torch.arange(len(depths), device=inputs.tokens.device)
        rows = inputs.ahead(1) + self.query(numbers)[:, None, None]  # (D, B, T, C)
        x = torch.cat([self.fuse(inputs.trunk)[None], rows.to(inputs.embedded.dtype)])
        for layer in self.layers:
            x, _ = layer(x, inputs.angles, inputs.mask)
        rows = self.norm(x[1:])
        low = [self.markov_w1(inputs.tokens_ahead(k)) * inputs.inside(k) for k in depths]
        outputs = (inputs.lm_head, self.markov_w2)
        kept = {}
        if self.confidence_head is not None:
            features = torch.cat([rows, torch.stack(low)], -1)
            kept["confidence"] = self.confidence_head(features).squeeze(-1)  # (D, B, T)
        return HeadOutput(
            [HeadRows((rows[k - 1], low[k - 1]), (k,), outputs) for k in depths], kept=kept
        )

    # --- losses ---------------------------------------------------------------------------------

    overlap_in_terms = True

    @classmethod
    def denominators(cls, counts: Tensor, weights: Tensor) -> Tensor:
        """One for the block: L_1 .. L_D are divided by the weighted mean of their counts."""
        total = weights.sum()
        mean = (counts * weights).sum(-1, keepdim=True) / total.masked_fill(total == 0, 1)
        return mean.expand_as(counts)

    @classmethod
    def terms(cls, mtp: MTPConfig) -> Mapping[str, float]:
        return {"confidence": mtp.options.confidence} if mtp.options.confidence else {}

    @classmethod
    def count_terms(cls, mtp: MTPConfig, valid: Tensor, taught: Tensor) -> Tensor:
        shares = depth_shares(mtp, 1.0)
        counts = taught.sum((1, 2)).double()  # (D,)
        return sum(share * count for share, count in zip(shares, counts, strict=True)).view(-1)[
            : len(cls.terms(mtp))
        ]

    def loss_terms(self, output: HeadOutput, scores: Scores) -> Mapping[str, Tensor]:
        logits = output.kept["confidence"]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        loss = F.binary_cross_entropy_with_logits(
            logits, scores.overlap.to(logits), reduction="none"
        )
        by_depth = (loss * scores.taught).sum((1, 2))
        shares = depth_shares(self.mtp, 1.0)
        return {
            "confidence": torch.stack([s * x for s, x in zip(shares, by_depth, strict=True)]).sum()
        }

    def confidence(self, output: HeadOutput) -> Tensor | None:
        logits = output.kept.get("confidence")
        return None if logits is None else logits.float().sigmoid()

    def cost(self) -> Cost:
        depths, config = self.mtp.depths, self.config
        products: list[nn.Module] = []
        if self.confidence_head is not None:
            products += [self.confidence_head] * depths
        for layer in self.layers:
            attention: Any = layer.self_attn
            once = [attention.kv_a_proj_with_mqa, attention.kv_b_proj]
            queries = ["q_a_proj", "q_b_proj"] if attention.q_compressed else ["q_proj"]
            each = [getattr(attention, name) for name in (*queries, "o_proj")]
            products += once + [*each, layer.mlp] * depths
        heads, value = config.num_attention_heads, config.v_head_dim
        wide = heads * (config.qk_nope_head_dim + config.qk_rope_head_dim + value)
        row = 4 * config.hidden_size + (config.q_lora_rank or 0) + wide + heads * value
        row += 4 * config.intermediate_size
        kept = len(self.layers) * (depths * row + config.kv_lora_rank + wide)
        return Cost(
            first_of_trunk=[self.fc],
            products=products,
            shared=depths,
            own=[self.markov_w2] * depths,
            attentions=len(self.layers) * depths,
            kept=kept,
        )

    # --- decoding -------------------------------------------------------------------------------

    @classmethod
    def drafter(cls, mtp: MTPConfig) -> type[Drafter]:
        return DSparkDrafter

    def decode_forms(self, model: nn.Module) -> list[Any]:
        return [DSparkForm(self)]


class ContextAttention(Attention):
    """As `ContextMLA`: what is remembered is the context, what is asked are the rows."""

    def remember(self, context: Tensor, cache: Tensor, window: Window) -> None:
        """context: (N, C) of the window's slots."""
        low = torch.mm(self.norm.direction(context), self.down)
        self.write(low[:, self.q_rank :], cache, window)

    def __call__(self, x: Tensor, cache: Tensor, window: Window) -> Tensor:
        hidden = self.norm.direction(x)
        if self.q_norm is not None:
            hidden = self.q_norm.direction(torch.mm(hidden, self.down[:, : self.q_rank]))
        return torch.addmm(x, self.look(hidden, cache, window), self.out)


class DSparkForm:
    """The layers of the head, made ready to decode."""

    def __init__(self, head: DSpark):
        self.attentions, self.mlps = [], []
        for layer in head.layers:
            self.attentions.append(ContextAttention(layer.input_layernorm, layer.self_attn))  # type: ignore[arg-type]
            self.mlps.append(Dense(layer.post_attention_layernorm, layer.mlp))  # type: ignore[arg-type]
        self.norm = Norm(head.norm)

    def remember(self, hidden: Tensor, caches: list[Tensor], window: Window) -> None:
        """hidden: (N, C), the context of the window's slots; caches: (B, S, R+P) of each layer."""
        for attention, cache in zip(self.attentions, caches, strict=True):
            attention.remember(hidden, cache, window)

    def forward(self, x: Tensor, caches: list[Tensor], window: Window) -> Tensor:
        """Rows (N, C) -> normed rows (N, C)."""
        for attention, mlp, cache in zip(self.attentions, self.mlps, caches, strict=True):
            x = mlp(attention(x, cache, window))
        return self.norm(x)


class DSparkDrafter(Drafter):
    """The trunk's slots are remembered as they are known; a step is one pass over `count` rows of
    the last of them, and then one small product for each draft.
    """

    def caches_needed(self) -> int:
        return self.options.block_layers

    def source(self, states: TrunkStates) -> Tensor:
        return self.model.mtp.fuse(states)

    def observe(
        self, states: TrunkStates, starts: Sequence[int], ids: Tensor, known: int = 0
    ) -> None:
        super().observe(states, starts, ids, known)
        length = states.post_norm.shape[0] // len(starts)
        if length > self.depth + 1:  # prefill; the last slot is left to `draft`
            self._remember([start + length - 1 for start in starts])

    def _remember(self, stops: Sequence[int]) -> None:
        """Brings the caches up to slot stops[b] - 1."""
        starts = self.filled[0]
        length = max(stop - start for start, stop in zip(starts, stops, strict=True))
        context = self.rings[0].read(starts, length).flatten(0, 1)
        window = self.slots.window(starts, length)
        self.decoder.run(DSparkForm.remember, self.decoder.heads[0], context, self.caches, window)
        self.filled = [list(stops) for _ in self.filled]

    def draft(self, ids: Tensor, last: Sequence[int], count: int, sampler: DraftSampler):
        head, rows = self.model.mtp, torch.arange(len(last), device=ids.device)
        self._remember(last)
        known = ids[rows, torch.tensor(last, device=ids.device)]
        x = self.model.model.embed_tokens(known)[:, None] + head.query.weight[:count]  # (B, K, C)
        window = self._rows(self.slots.window([m - 1 for m in last], 1), count)
        form = self.decoder.heads[0]
        out = self.decoder.run(DSparkForm.forward, form, x.flatten(0, 1), self.caches, window)
        logits = self.decoder.draft_logits(out).unflatten(0, (-1, count))  # (B, K, V)
        out, drawn = out.unflatten(0, (-1, count)), []
        for k in range(count):
            low, certain = head.markov_w1(known), None
            if head.confidence_head is not None:
                features = torch.cat([out[:, k], low], -1)
                certain = head.confidence_head(features).squeeze(-1).float().sigmoid()
            bias = self.decoder.narrow(F.linear(low, head.markov_w2.w2))
            drawn.append(sampler.draw(logits[:, k] + bias, certain))
            known = drawn[-1][0]
            if sampler.ended:
                break
        return write_drafts(ids, last, drawn)

    @staticmethod
    def _rows(window: Window, count: int) -> Window:
        """A window of one slot, for `count` rows of that slot."""
        return window._replace(
            shape=(window.shape[0], count),
            rotation=window.rotation.repeat_interleave(count, 0),
            mask=None if window.mask is None else window.mask.repeat(1, 1, count, 1),
        )
