"""DeepSeek-V3 with 1+D prediction heads: from tokens to the rows of all heads, and their losses.

trunk.py has the trunk, heads/ the heads, loss.py what is made of their rows.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dsv3_mtp.config import ModelConfig, MTPConfig
from dsv3_mtp.config.code import is_code
from dsv3_mtp.config.layout import layers_read
from dsv3_mtp.model.layers import RMSNorm, rotary_angles
from dsv3_mtp.model.loss import MTPLoss
from dsv3_mtp.model.moe import Experts, Gate, RouterStats
from dsv3_mtp.model.output import Batch, LossSettings, MTPOutput
from dsv3_mtp.model.own_heads import check_rows
from dsv3_mtp.model.states import HeadInputs, HeadOutput, HeadRows, LMHead, TrunkStates, row_keys
from dsv3_mtp.model.targets import document_starts
from dsv3_mtp.model.trunk import Trunk
from dsv3_mtp.ops.compute import building, given
from dsv3_mtp.ops.ranges import named
from dsv3_mtp.precision.stored import is_codes


class DeepseekV3MTP(nn.Module):
    """The model of DeepSeek-V3 section 2; `mtp.mode: none` is the plain one, bit for bit."""

    frozen = False  # by `freeze_trunk`: only the heads learn

    def __init__(self, config: ModelConfig, mtp: MTPConfig):
        super().__init__()
        self.config, self.mtp_config, self.shard = config, mtp, given().shard
        self.offsets, self.lookahead = mtp.offsets, mtp.lookahead
        self.own = is_code(mtp.mode)  # the heads are of a file of one's own
        self.model = Trunk(config, frozenset(layers_read(mtp)))
        self.lm_head = LMHead(config.hidden_size, config.vocab_size, bias=False)
        with building(given().heads or given()):
            self.mtp: Any = mtp.kind(config, mtp) if mtp.depths else None
        self.loss = MTPLoss(mtp, self.lm_head, self.mtp, self.shard)
        self.draw = 0, 0  # seed and step; heads that draw random numbers in training hash both

    @property
    def depths(self) -> int:
        return self.mtp_config.depths

    @property
    def device(self) -> torch.device:
        """Of the weights of this process: a pipeline stage has the rest on the meta device."""
        return next((p.device for p in self.parameters() if not p.is_meta), torch.device("meta"))

    def forward(
        self,
        tokens: Tensor,
        documents: Tensor | None = None,
        scored: Tensor | None = None,
        settings: LossSettings | None = None,
    ) -> MTPOutput:
        """Losses and metrics of all heads on one micro-batch; slices, never rolls (V3 Fig. 3).

        Args:
            tokens: (B, T+1+A) int64, 1+A = `lookahead`: D+1 where depth k predicts t_{i+k+1}, cut
                out as tokens[:, k+1:k+1+T].
            documents: (B, T+1+A) document numbers: attention, targets and MTP inputs stay inside
                documents. None: packed without masks (V3 section 4.1).
            scored: (B, T+1+A) bool, the tokens that are targets, at every depth. None: all.
            settings: of the optimizer step. None: LossSettings(), one whole step by itself.
        """
        output = self.head_rows(tokens, documents)
        return self.loss(output, tokens, documents, scored, settings or LossSettings())

    def head_rows(self, tokens: Tensor, documents: Tensor | None = None) -> HeadOutput:
        """tokens (B, T+1+A) -> the rows of depth 0..D and the stats of every router."""
        angles, mask = self.positions(tokens, documents)
        length = angles.shape[1]
        # A frozen trunk keeps nothing for a backward.
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            # (B, T+A, C), each token looked up once
            embedded = self.model.embed_tokens(tokens[:, :-1])
            trunk, stats = self.model(embedded[:, :length], angles, mask)
        return self.rows_from(trunk, stats, embedded[:, 1:], angles, mask, tokens, documents)

    def positions(
        self, tokens: Tensor, documents: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """What every block reads of a micro-batch (B, T+1+A): rotary angles (2, T, P/2), and the
        document mask, which is that of whole rows.
        """
        length = tokens.shape[1] - self.lookahead
        slots = self.shard.number * length + torch.arange(length, device=tokens.device)
        mask = (
            None if documents is None else document_starts(self.shard.gather(documents[:, :length]))
        )
        return rotary_angles(self.config, slots), mask

    @named("heads")
    def rows_from(
        self,
        trunk: TrunkStates,
        stats: list[RouterStats],
        embedded: Tensor,
        angles: Tensor,
        mask: Tensor | None,
        tokens: Tensor,
        documents: Tensor | None = None,
    ) -> HeadOutput:
        """`head_rows` from the trunk on.

        stats: of the trunk's routers; embedded: (B, T-1+A, C), the tokens ahead of slot 0.
        """
        main = HeadRows((trunk.post_norm,), (0,), (self.lm_head,))
        if not self.depths:
            return HeadOutput([main], [*stats])
        detach, length = self.mtp_config.detach, angles.shape[1]
        seed, step = self.draw if self.mtp.training else (self.draw[0], 0)

        def keys() -> Tensor:
            first = self.shard.number * length
            return row_keys(tokens[:, :length], first, self.shard.gather, seed=seed, step=step)

        inputs = HeadInputs(
            trunk=trunk if detach == "none" else trunk.detach(),
            embedded=embedded.detach() if detach == "all" else embedded,
            angles=angles,
            mask=mask,
            tokens=tokens,
            documents=documents,
            lm_head=self.lm_head,
            keys=keys,
            shard=self.shard,
        )
        with self.lm_head.held(constant=detach == "all"):
            heads = self.mtp(inputs)
        if self.own:
            routers = sum(isinstance(module, Gate) for module in self.mtp.modules())
            check_rows(self.mtp_config, heads, trunk.post_norm.shape[:2], routers)
        return HeadOutput([main, *heads.rows], [*stats, *heads.stats], heads.kept)

    def logits(self, tokens: Tensor, documents: Tensor | None = None) -> Tensor:
        """(B, T+1+A) -> (1+D, B, T, V) logits of every head, nan for a depth without rows. For
        tests and analysis: training never holds them.
        """
        found: list[Any] = [None] * (1 + self.depths)
        for rows in self.head_rows(tokens, documents).rows:
            logits = rows.logits()
            for depth in rows.depths:
                found[depth] = logits
        empty = torch.full_like(found[0], float("nan"))
        return torch.stack([empty if logits is None else logits for logits in found])

    @torch.no_grad()
    def evaluate(self, batch: Batch, *, blanks: int = 0) -> MTPOutput:
        """Sums of the outputs for micro-batches in eval mode; the last `blanks` do not count."""
        total, training = self.no_output(), self.training
        self.eval()
        for left, (tokens, documents, scored) in zip(range(len(batch), 0, -1), batch, strict=True):
            out = self(tokens, documents, scored, LossSettings(overlap=True)).sums()
            total = total + out if left > blanks else total
        self.train(training)
        return total

    def no_output(self) -> MTPOutput:
        """The sums over no micro-batch."""
        zeros = partial(torch.zeros, dtype=torch.float64, device=self.device)
        heads, routers = 1 + self.depths, len(self.gates())
        terms = len(self.loss.terms) + len(self.loss.objectives) * self.depths
        return MTPOutput(
            loss=zeros(()),
            nll_sum=zeros(heads),
            targets=zeros(heads),
            correct=zeros(heads),
            agreed=zeros(self.depths),
            compared=zeros(self.depths),
            overlap=zeros(4, self.depths),
            term_sum=zeros(terms),
            term_count=zeros(terms),
            balance=zeros(()),
            load=zeros(routers, self.config.n_routed_experts if routers else 1),
            nodes=zeros(routers),
        )

    def gates(self) -> list[Gate]:
        """Every router, in the order of `MTPOutput.load`: the trunk's, then the MTP modules'."""
        return [module for module in self.modules() if isinstance(module, Gate)]

    @torch.no_grad()
    def update_router_bias(self, load: Tensor, speed: float) -> None:
        """load: (routers, E) of the whole optimizer step over all ranks; MTP routers are routers
        like the others.

        A frozen router (`freeze_trunk`) keeps its bias.
        """
        for gate, gate_load in zip(self.gates(), load, strict=True):
            if gate.weight.requires_grad:
                gate.update_bias(gate_load, speed)

    def freeze_trunk(self) -> None:
        """Only the heads go on learning: not embedding, trunk, its routers and output head."""
        self.frozen = True
        for part in (self.model, self.lm_head):
            part.requires_grad_(False)

    @torch.no_grad()
    def init_weights(
        self, seed: int, *, writable: Callable[[Tensor], AbstractContextManager[Any]] = nullcontext
    ) -> None:
        """All weights N(0, initializer_range), norms 1, router biases 0 (V3 section 4.2: 0.006 for
        everything).

        Trunk and head first: models of different `mtp` settings and the same seed start from the
        same trunk. A part of a layer's experts starts as in the whole layer, and low precision as
        float32 rounded.

        Args:
            writable: context in which a parameter can be written, for parameters that are kept in
                parts.
        """
        generator = torch.Generator(self.device).manual_seed(seed)
        for module in self.modules():
            for parameter in module.parameters(recurse=False):
                with writable(parameter):
                    if isinstance(module, RMSNorm):
                        parameter.fill_(1.0)
                        continue
                    first, count = 0, len(parameter)
                    if isinstance(module, Experts):
                        first, count = module.first, self.config.n_routed_experts
                    _draw(parameter, generator, self.config.initializer_range, first, count)
        for gate in self.gates():
            gate.e_score_correction_bias.zero_()
        self.start_heads(writable=writable)

    @torch.no_grad()
    def start_heads(
        self, *, writable: Callable[[Tensor], AbstractContextManager[Any]] = nullcontext
    ) -> None:
        """What of the heads starts at other values than random ones (heads/base.py: `start`)."""
        if self.depths and not self.lm_head.weight.is_meta:  # else on another pipeline stage
            self.mtp.start(self.model, self.lm_head, writable)


def _draw(
    parameter: Tensor, generator: torch.Generator, spread: float, first: int, count: int
) -> None:
    """Fills a parameter, which is number `first` to first + len(parameter) of a stack of `count`,
    with those of the normal numbers drawn for the whole stack. Codes are only ever loaded: theirs
    are drawn for the parameters that follow. Of another pipeline stage: on meta, not kept.
    """
    wide = torch.promote_types(parameter.dtype, torch.float32)
    size = parameter[0].numel()
    # One of a stack of matrices at a time: on a CPU the same numbers as all at once where each
    # has a multiple of the 16 that torch draws together.
    step = 1 if parameter.ndim == 3 and size % 16 == 0 else count
    for start in range(0, count, step):
        values = torch.empty(
            (step, *parameter.shape[1:]), dtype=wide, device=generator.device
        ).normal_(0.0, spread, generator=generator)
        mine = parameter[max(start - first, 0) : max(start + step - first, 0)]
        if len(mine) and not is_codes(parameter):
            mine.copy_(values[max(first - start, 0) :][: len(mine)])


def meta_model(config: ModelConfig, mtp: MTPConfig, *, freeze: str = "none") -> DeepseekV3MTP:
    """The model without storage, for its names, shapes and sizes. freeze: `train.freeze`."""
    with torch.device("meta"):
        model = DeepseekV3MTP(config, mtp)
    if freeze == "trunk":
        model.freeze_trunk()
    return model
