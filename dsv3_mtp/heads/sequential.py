"""DeepSeek-V3's heads: a causal chain of modules, each reading the one before it and the next
token.

V3 section 2.2, eqs. 21-25. Ablations: `chain`, `embed`, `trunk_hidden`, `share_weights`, `block`.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dsv3_mtp.config import ModelConfig, MTPConfig
from dsv3_mtp.config.section import Boolean, Section
from dsv3_mtp.decode.cache import FewSlots, Window, put, span
from dsv3_mtp.decode.draft import Drafter, stacked
from dsv3_mtp.decode.layers import Layers, Merge
from dsv3_mtp.decode.sample import DraftSampler
from dsv3_mtp.heads.base import Cost, Export, Head, SharedHead
from dsv3_mtp.model.block import DecoderLayer
from dsv3_mtp.model.layers import RMSNorm
from dsv3_mtp.model.states import HeadInputs, HeadOutput, HeadRows, TrunkStates
from dsv3_mtp.ops.c_step import Drafting
from dsv3_mtp.ops.compute import given


class SequentialOptions(Section):
    """Keys of `mtp:` with mode sequential."""

    trunk_hidden: Literal["post_norm", "pre_norm"] = "post_norm"
    """The trunk state that module 1 reads, after or before the final norm (open in V3 2.2)."""
    chain: Literal["hidden", "trunk"] = "hidden"
    """Module k reads h_{k-1} (V3 eq. 21), or always the trunk's state."""
    embed: Boolean = True
    """Modules read the embedding of the token at i+k (V3 eq. 21)."""
    share_weights: Boolean = False
    """One module, used at every depth."""
    block: Literal["trunk", "dense"] = "trunk"
    """The module's layer is of the kind of the trunk's last one (V3), or dense (MiMo, LongCat)."""


class MTPModule(DecoderLayer):
    """DeepSeek-V3's module k (eqs. 21-23): merge the previous hidden state with the token k ahead,
    one block.

        h'_k = eh_proj([enorm(Emb(t_{i+k})) ; hnorm(h_{k-1})])
        h_k  = Block(h'_k), read through shared_head.norm

    The embedding half comes FIRST in eh_proj, as in all released weights and engines; the paper's
    eq. 21 writes it second. The two differ by a permutation of eh_proj's columns. With `embed:
    false` (ablation) eh_proj is (C, C) and reads the hidden half alone.
    """

    def __init__(self, config: ModelConfig, options: SequentialOptions):
        # the trunk's layers before layer 0, so to speak, are dense
        super().__init__(
            config, layer=config.num_hidden_layers - 1 if options.block == "trunk" else -1
        )
        self.enorm = RMSNorm(config.hidden_size, config.rms_norm_eps) if options.embed else None
        self.hnorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        inputs = config.hidden_size * (2 if options.embed else 1)
        self.eh_proj = given().linear("eh_proj", inputs, config.hidden_size)
        self.shared_head = SharedHead(config)

    def merge(self, hidden: Tensor, embedding: Tensor) -> Tensor:
        """hidden h_{k-1} and embedding of t_{i+k}, both (B, T, C) -> h'_k (B, T, C)."""
        parts = (
            [self.hnorm(hidden)]
            if self.enorm is None
            else [self.enorm(embedding), self.hnorm(hidden)]
        )
        return self.eh_proj(torch.cat(parts, dim=-1))


class Sequential(Head):
    """The causal chain: module k reads module k-1 (`chain: hidden`) or always the trunk (`chain:
    trunk`).

    `share_weights` recycles one module D times. The state fed at k=1 and the state chained are of
    the same stage: both normed (`trunk_hidden: post_norm`) or both not (`pre_norm`).
    """

    name, default = "sequential", True
    Options = SequentialOptions
    options: SequentialOptions

    def __init__(self, config: ModelConfig, mtp: MTPConfig):
        super().__init__(config, mtp)
        count = 1 if self.options.share_weights else mtp.depths
        self.layers = nn.ModuleList(MTPModule(config, self.options) for _ in range(count))

    @classmethod
    def reads(cls, mtp: MTPConfig) -> frozenset[str | int]:
        return frozenset({mtp.options.trunk_hidden})

    @classmethod
    def horizon(cls, mtp: MTPConfig, depth: int) -> int:
        return depth if mtp.options.embed else 0

    def forward(self, inputs: HeadInputs) -> HeadOutput:
        normed = self.options.trunk_hidden == "post_norm"
        trunk_hidden = inputs.trunk.post_norm if normed else inputs.trunk.pre_norm
        states, rows, stats = [trunk_hidden], [], []  # states: of depth 0, 1, ..
        for depth in range(1, 1 + self.mtp.depths):
            module: Any = self.layers[min(depth, len(self.layers)) - 1]
            merged = module.merge(self.previous(states, inputs), inputs.ahead(depth))
            out, routed = module(merged, inputs.angles, inputs.mask)
            read = module.shared_head(out)
            rows.append(HeadRows((read,), (depth,), (inputs.lm_head,)))
            states.append(read if normed else out)
            stats.append(routed)
        # one router: its D forwards count once in the balance loss
        if self.options.share_weights and stats[0] is not None:
            total = sum(stats[1:], start=stats[0])
            stats = [total._replace(balance=total.balance / self.mtp.depths)]
        return HeadOutput(rows, stats)

    def previous(self, states: Sequence[Tensor], inputs: HeadInputs) -> Tensor:
        """What module k = len(states) reads, of the states (B, T, C) of depths 0..k-1."""
        return states[-1] if self.options.chain == "hidden" else states[0]

    def cost(self) -> Cost:
        depths, hidden = self.mtp.depths, self.config.hidden_size
        blocks = [self.layers[min(k, len(self.layers)) - 1] for k in range(1, 1 + depths)]
        # what is merged, its two normed halves, and their projection
        return Cost(blocks, shared=depths, kept=4 * hidden * depths)

    @classmethod
    def drafter(cls, mtp: MTPConfig) -> type[Drafter]:
        return ChainDrafter

    def decode_forms(self, model: Any) -> list[Any]:
        return [Module(module, model, self.options) for module in self.layers]  # type: ignore[arg-type]

    # --- DeepSeek-V3's layout: model.layers.{L+k-1} ----------------------------------------------

    @classmethod
    def export(cls, config: ModelConfig, mtp: MTPConfig) -> Export:
        options, remedy = mtp.options, "; export the trunk alone with --trunk-only"
        problems = []
        if options.trunk_hidden == "pre_norm":
            reads = "every reader of the layout feeds the trunk's normed output"
            problems.append(f"mtp.trunk_hidden: pre_norm: {reads}{remedy}")
        if options.chain == "trunk" and mtp.depths > 1:
            reads = "readers chain the modules' hidden states"
            problems.append(f"mtp.chain: trunk with {mtp.depths} depths: {reads}{remedy}")
        if not options.embed:
            reads = "the layout's eh_proj reads the token embedding"
            problems.append(f"mtp.embed: false: {reads}{remedy}")
        if options.block == "dense":
            problems.append(f"mtp.block: dense: the layout's MTP modules are MoE{remedy}")
        elif config.first_k_dense_replace == config.num_hidden_layers:
            text = (
                "model.first_k_dense_replace: all layers are "
                "dense, so the MTP modules are; the layout's are MoE"
            )
            problems.append(f"{text}{remedy}")
        notes = []
        if options.share_weights and mtp.depths > 1:
            once = f"this run recycles it for its {mtp.depths} depths"
            notes.append(f"one MTP module is written: {once}")
        return Export(1 if options.share_weights else mtp.depths, problems, notes)

    @classmethod
    def load(cls, config: ModelConfig, mtp: MTPConfig, stored: int, trunk_hidden: str) -> Export:
        own = min(mtp.depths, 1) if mtp.options.share_weights else mtp.depths
        modules, problems, notes = min(own, stored), [], []
        usual = {"trunk_hidden": trunk_hidden, "embed": True, "block": "trunk"}
        usual |= {"chain": "hidden"} if own > 1 else {}
        if modules:
            problems = [
                f"mtp.{key}: {getattr(mtp.options, key)}, the checkpoint's MTP modules have {value}"
                for key, value in usual.items()
                if getattr(mtp.options, key) != value
            ]
            if modules > 1 and trunk_hidden == "pre_norm":
                problems.append(
                    "mtp.num_nextn_predict_layers: frameworks that feed the trunk before its norm "
                    "(torchtitan) chain normed states, this code then does not: 1 module at most"
                )
            if config.first_k_dense_replace == config.num_hidden_layers:
                problems.append(
                    "model.first_k_dense_replace: all layers are "
                    "dense here, the checkpoint's MTP modules are MoE"
                )
        if modules < own:
            notes.append(f"MTP module(s) {modules + 1}..{own}")
        return Export(modules, problems, notes)


def layout_module(config: ModelConfig) -> MTPModule:
    """An MTP module as the layout has it: MoE, whatever the trunk's last layer is."""
    return MTPModule(config.model_copy(update={"first_k_dense_replace": 0}), SequentialOptions())


# --- decoding -----------------------------------------------------------------------------------


class Module:
    """A module made ready to decode."""

    def __init__(self, module: MTPModule, model: Any, options: SequentialOptions):
        norms = [norm for norm in (module.enorm, module.hnorm) if norm is not None]
        table = model.model.embed_tokens.weight if module.enorm is not None else None
        merge = Merge(norms, module.eh_proj.weight)
        self.layer = Layers([module], module.shared_head.norm, table, merge)
        self.embeds = table is not None
        self.normed = options.trunk_hidden == "post_norm"

    def forward(
        self, hidden: Tensor, tokens: Tensor, cache: Tensor, window: Window | FewSlots
    ) -> tuple[Tensor, Tensor]:
        """States (B*T, C), tokens (B, T) -> state and normed state of the rows asked for."""
        _, out, normed = self.layer(hidden, tokens if self.embeds else None, [cache], window)
        return (normed if self.normed else out), normed


class ChainDrafter(Drafter):
    """Depth k reads the state of depth k-1 and the embedding of the token k ahead.

    Beyond the trained depths (`recycle`): "last", the last module goes on, one slot further per
    draft, and its own state stands in for the trunk state of a slot that the trunk has not seen.
    "cycle": the modules follow one another at the same slot, as if the chain had K of them.

    Two modules, three drafts; t_m is the last known token, so that the trunk has states of slots
    0..m-1:

        module 1, slot m-1   reads the trunk's state of m-1      and t_m       drafts t_{m+1}
        module 2, slot m-1   reads module 1's state of m-1       and t_{m+1}   drafts t_{m+2}
        module 2, slot m     reads its own state of m-1          and t_{m+2}   drafts t_{m+3}
    or  module 1, slot m-1   reads module 2's state of m-1       and t_{m+2}   drafts t_{m+3}

    If t_{m+1} stands and t_{m+2} is replaced, m grows by 2. Module 1 then computes slots m and m+1
    (old m). Module 2 begins at m-1 again: the token it read there was a draft. `filled` holds where
    each module begins.
    """

    options: SequentialOptions

    @classmethod
    def limit(cls, mtp: MTPConfig, depth: int) -> int:
        return depth

    def modules_needed(self) -> int:
        return self.depth if self.recycle == "cycle" else super().modules_needed()

    def rings_needed(self) -> int:
        return self.modules if self.options.chain == "hidden" else 1

    def drafting(self) -> Drafting | None:
        restarts = self.options.chain == "trunk" and self.depth > 1
        if type(self) is not ChainDrafter or self.modules != 1 or restarts:
            return None
        layers = self.decoder.heads[0].layer.by_c
        normed = self.options.trunk_hidden == "post_norm"
        return Drafting(layers, self.decoder.draft_linear, self.decoder.draft_ids, normed)

    def source(self, states: TrunkStates) -> Tensor:
        return states.post_norm if self.options.trunk_hidden == "post_norm" else states.pre_norm

    def observe(
        self, states: TrunkStates, starts: Sequence[int], ids: Tensor, known: int = 0
    ) -> None:
        super().observe(states, starts, ids, known)
        length = states.post_norm.shape[0] // len(starts)
        if length <= self.depth + 1:  # a decode step: `draft` comes next and catches up
            return
        # prefill: slots whose token k ahead is in the prompt
        for depth in range(1, 1 + self.modules):
            first = self.filled[depth - 1]
            stop = min(starts[0] + length, known - depth)
            if stop > first[0]:
                self._run(depth, first, stop - first[0], ids, [0])
                self.filled[depth - 1] = [stop] * len(starts)

    def draft(self, ids: Tensor, last: Sequence[int], count: int, sampler: DraftSampler):
        drawn, hidden = [], None
        for depth in range(1, 1 + count):
            if depth <= self.modules:
                hidden, normed = self._catch_up(depth, last, ids)
            else:
                starts = [m - 1 + depth - self.modules for m in last]
                if self.options.chain == "trunk":
                    hidden = self.rings[0].read([m - 1 for m in last], 1).squeeze(1)
                hidden, normed = self._module(self.modules, hidden, starts, 1, ids, None)
            drawn.append(sampler.draw(self.decoder.draft_logits(normed)))  # (B,), (B, V)
            put(ids, [m + depth for m in last], drawn[-1][0])
            if sampler.ended:
                break
        left_out = range(1 + len(drawn), 1 + self.modules)
        # the last one is furthest behind
        if left_out and self.lag(self.modules - 1, last) > self.LAG:
            for depth in left_out:
                self._catch_up(depth, last, ids)
        return stacked(drawn)

    def _catch_up(self, depth: int, last: Sequence[int], ids: Tensor) -> tuple[Tensor, Tensor]:
        """Depth's states up to slot last[b] - 1; that slot's chained and normed state, (B, C)."""
        starts = self.filled[depth - 1]
        counts = [m - start for m, start in zip(last, starts, strict=True)]
        length = max(counts)
        wanted = [row * length + count - 1 for row, count in enumerate(counts)]
        states = self._run(depth, starts, length, ids, wanted)
        self.filled[depth - 1] = [max(s, m - depth + 1) for s, m in zip(starts, last, strict=True)]
        return states

    def _run(
        self, depth: int, starts: Sequence[int], length: int, ids: Tensor, wanted: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """Depth's chained and normed states of the `wanted` of `length` slots from starts[b], rows
        of (B*T, C). The next depth's ring gets all chained ones.
        """
        chained = self.options.chain == "hidden"
        hidden = self.rings[depth - 1 if chained else 0].read(starts, length).flatten(0, 1)
        if chained and depth < self.modules:
            out, normed = self._module(depth, hidden, starts, length, ids, None)
            self.rings[depth].write(starts, out.view(len(starts), length, -1))
            return out[wanted], normed[wanted]
        # of the other slots nobody reads more than their entries of the cache
        return self._module(depth, hidden, starts, length, ids, None if length == 1 else wanted)

    def _module(
        self, depth: int, hidden: Any, starts: Sequence[int], length: int, ids: Tensor, asked: Any
    ) -> tuple[Tensor, Tensor]:
        """One module on (B*T, C) states -> chained and normed states of the rows asked for."""
        tokens = span(ids, [start + depth for start in starts], length)
        window = self.decoder.window(self.slots, starts, length, asked)
        head = self.decoder.heads[(depth - 1) % len(self.decoder.heads)]
        cache = self.caches[depth - 1]
        return self.decoder.run(Module.forward, head, hidden, tokens, cache, window)
