"""DeepSeek-V3 with 1+D prediction heads: trunk, heads, loss, init."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dsv3_mtp.config import ModelConfig, MTPConfig
from dsv3_mtp.config.layout import layers_read
from dsv3_mtp.config.schedules import depth_loss_weights
from dsv3_mtp.model.block import DecoderLayer
from dsv3_mtp.model.layers import RMSNorm, rotary_angles
from dsv3_mtp.model.moe import Experts, Gate, RouterStats
from dsv3_mtp.model.output import Batch, LossSettings, MTPOutput
from dsv3_mtp.model.overlap import row_overlap
from dsv3_mtp.model.states import (
    HeadInputs,
    HeadOutput,
    HeadRows,
    LMHead,
    Scores,
    TrunkStates,
    opened,
    row_keys,
)
from dsv3_mtp.model.targets import (
    agreement,
    count_targets,
    document_starts,
    target_tokens,
    teacher_slots,
    valid_targets,
)
from dsv3_mtp.objectives.draft import TV
from dsv3_mtp.objectives.losses import Teacher, objective_losses
from dsv3_mtp.ops.compute import building, given
from dsv3_mtp.ops.cross_entropy import chunked_cross_entropy, linear_cross_entropy
from dsv3_mtp.ops.ranges import named


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


class DeepseekV3MTP(nn.Module):
    """The model of DeepSeek-V3 section 2. `mtp.mode: none` is the plain language model, bit for
    bit.
    """

    frozen = False  # by `freeze_trunk`: only the heads learn

    def __init__(self, config: ModelConfig, mtp: MTPConfig):
        super().__init__()
        self.config, self.mtp_config, self.shard = config, mtp, given().shard
        self.offsets, self.lookahead = mtp.offsets, mtp.lookahead
        self.model = Trunk(config, frozenset(layers_read(mtp)))
        self.lm_head = LMHead(config.hidden_size, config.vocab_size, bias=False)
        with building(given().heads or given()):
            self.mtp: Any = mtp.kind(config, mtp) if mtp.depths else None
        # of the losses that the heads own: name -> factor
        self.terms: dict[str, float] = dict(mtp.kind.terms(mtp)) if mtp.depths else {}
        # what the heads are trained on: the label's cross-entropy, with this weight, and others
        objectives = mtp.objectives
        self.label_weight = sum(weight for kind, weight in objectives if kind.cross_entropy)
        self.objectives = [(kind, weight) for kind, weight in objectives if not kind.cross_entropy]
        self.draw = 0, 0  # seed and step, of which heads draw random numbers while they train

    @property
    def depths(self) -> int:
        return self.mtp_config.depths

    @property
    def device(self) -> torch.device:
        """Of the weights that this process holds: a pipeline stage has the rest on the meta
        device.
        """
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
        return self.losses(output, tokens, documents, scored, settings or LossSettings())

    def losses(
        self,
        output: HeadOutput,
        tokens: Tensor,
        documents: Tensor | None,
        scored: Tensor | None,
        settings: LossSettings,
    ) -> MTPOutput:
        """`forward` from the rows of all heads and the stats of every router on."""
        length, depths = tokens.shape[1] - self.lookahead, self.depths
        normalizer, loss_weights = settings.normalizer, settings.loss_weights
        if normalizer is None:
            normalizer = self.counts(tokens, documents, scored)
        if loss_weights is None:
            loss_weights = depth_loss_weights(self.mtp_config, progress=0.0)
        valid = self.scored_slots(valid_targets(tokens, documents, self.offsets, scored), output)
        targets = target_tokens(tokens, self.offsets)  # (1+D, B, T)
        counts = normalizer[: 1 + depths]  # per rank: below 1 with fewer targets than ranks
        if depths:
            counts = torch.cat([counts[:1], self._denominators(counts[1:], loss_weights)])
        weights = _vector([1.0, *(self.label_weight * weight for weight in loss_weights)], counts)
        scale = weights / counts.masked_fill(counts == 0, 1)  # (1+D,)
        row_weight = scale[:, None, None] * valid  # (1+D, B, T)
        loss, nll, prediction = self._head_losses(output.rows, targets, row_weight)
        by_depth = self.by_depth(output)
        for_terms, for_objectives = normalizer[2 + depths :].split(
            [len(self.terms), len(self.objectives) * depths]
        )
        taught = teacher_slots(valid, self.offsets, self.shard.beyond(self.lookahead - 1))
        of_objectives, objective_sum, overlap = self._objective_losses(
            output.rows, targets[1:], valid, taught, loss_weights, for_objectives
        )
        scores = Scores(nll, prediction, targets, valid, taught, overlap)
        of_terms, term_sum = self._terms(output, scores, for_terms)
        stats = output.routed
        balance = sum(
            (routed.balance for routed in stats), start=tokens.new_zeros((), dtype=torch.float32)
        )
        main = self.shard.gather(prediction[0])[
            :, self.shard.number * length :
        ]  # from slot 0 here to the row's end
        agreed, compared = agreement(prediction, valid, main, self.offsets)
        alpha = settings.balance_loss_weight
        return MTPOutput(
            loss=loss
            + of_terms
            + of_objectives
            + alpha * balance / normalizer[1 + depths].to(balance),
            nll_sum=(nll * valid).sum((1, 2)),
            targets=valid.sum((1, 2)),
            correct=((prediction == targets) & valid).sum((1, 2)),
            agreed=agreed,
            compared=compared,
            overlap=row_overlap(
                self.head_logits, by_depth, valid, self.shard, self.config.vocab_size, self.offsets
            )
            if settings.overlap
            else nll.new_zeros(4, self.depths, dtype=torch.float64),
            term_sum=torch.cat([term_sum, objective_sum]),
            term_count=self.counts(tokens, documents, scored, part=True)[2 + depths :]
            if self.terms or self.objectives
            else counts.new_zeros(0),
            balance=balance.detach(),
            load=torch.stack([routed.load for routed in stats]) if stats else nll.new_zeros((0, 1)),
            nodes=torch.stack([routed.nodes for routed in stats])
            if stats
            else targets.new_zeros(0),
        )

    def counts(
        self,
        tokens: Tensor,
        documents: Tensor | None = None,
        scored: Tensor | None = None,
        *,
        part: bool = False,
    ) -> Tensor:
        """(2+D+terms,) float64: valid targets of depth 0..D, the number of sequences, the counts of
        the terms that the heads own, and of each objective at depth 1..D. Adds up over batches and
        ranks.

        part: the tokens are this process's slots of rows, not whole rows.
        """
        counts = [count_targets(tokens, documents, self.offsets, scored)]
        if self.terms or self.objectives:
            valid = valid_targets(tokens, documents, self.offsets, scored)
            beyond = self.shard.beyond(self.lookahead - 1) if part else 0
            taught = teacher_slots(valid, self.offsets, beyond)
        if self.terms:
            counts.append(self.mtp.count_terms(self.mtp_config, valid, taught).double())
        if self.objectives:
            counts.append(self._counted(valid, taught).sum((2, 3)).flatten().double())
        return torch.cat(counts)

    def _denominators(self, counts: Tensor, loss_weights: Sequence[float]) -> Tensor:
        """What the sums of depth 1..D are divided by. counts: (.., D)."""
        return self.mtp_config.kind.denominators(counts, _vector(loss_weights, counts.flatten()))

    def _counted(self, valid: Tensor, taught: Tensor) -> Tensor:
        """(m, D, B, T) bool: the slots that each of the m objectives is summed over. valid: (1+D,
        B, T); taught: (D, B, T).
        """
        return torch.stack(
            [kind.counted(taught if kind.teacher else valid[1:]) for kind, _ in self.objectives]
        )

    def scored_slots(self, valid: Tensor, output: HeadOutput, first: int = 0) -> Tensor:
        """`valid` of depths first..D, less the depths that have no row."""
        there = {depth for rows in output.rows for depth in rows.depths}
        for depth in range(first, 1 + self.depths):
            if depth not in there:
                valid[depth - first] = False
        return valid

    def _terms(
        self, output: HeadOutput, scores: Scores, counts: Tensor
    ) -> tuple[Tensor | float, Tensor]:
        """The part of the losses that the heads own, in units of the normalizer, and their sums."""
        if not self.terms:
            return 0.0, scores.nll.new_zeros(0)
        found = self.mtp.loss_terms(output, scores)
        sums = torch.stack([found[name] for name in self.terms])  # (terms,)
        factors = torch.cat([counts.new_full((1,), factor) for factor in self.terms.values()])
        scale = factors / counts.masked_fill(counts == 0, 1)
        return (scale.to(sums) * sums).sum(), sums.detach()

    def _objective_losses(
        self,
        rows: list[HeadRows],
        targets: Tensor,
        valid: Tensor,
        taught: Tensor,
        loss_weights: tuple[float, ...],
        counts: Tensor,
    ) -> tuple[Tensor | float, Tensor, Tensor]:
        """The part of `mtp.objective` other than the label's cross-entropy, the sums of its values,
        (m*D,), and the overlap (D, B, T), 0 where nothing asks for it. targets: (D, B, T); valid:
        (1+D, B, T); taught: (D, B, T); counts: (m*D,).
        """
        own, overlap = len(self.objectives), torch.zeros_like(taught, dtype=torch.float32)
        watched = bool(self.terms) and self.mtp.overlap_in_terms
        if not own and not watched:
            return 0.0, counts.new_zeros(0), overlap
        kinds = [kind for kind, _ in self.objectives] + [TV()] * watched
        counts = self._denominators(counts.view(own, self.depths), loss_weights)
        shares = [share * weight for _, share in self.objectives for weight in loss_weights]
        factors = _vector(shares, counts.flatten()).view_as(counts) if own else counts
        scale = (factors / counts.masked_fill(counts == 0, 1))[..., None, None]
        scale = torch.cat([scale, scale.new_zeros(int(watched), self.depths, 1, 1)])
        count, counted = self.lookahead - 1, taught[:0][None].expand(0, *taught.shape)
        if own:
            counted = self._counted(valid, taught)
        counted = torch.cat([counted, taught.expand(int(watched), *taught.shape)])
        states = rows[0].inputs[0].detach()
        states = torch.cat([states, self.shard.following(states, count)], dim=1)
        ahead = tuple(offset - 1 for offset in self.offsets[1:])
        loss, values = objective_losses(
            kinds,
            rows[1:],
            Teacher(self.lm_head, states, ahead),
            targets,
            scale * counted,
            constant=self.mtp_config.detach == "all",
        )
        if watched:
            overlap = (1 - values[-1]) * taught
        return loss, (values * counted)[:own].sum((2, 3)).flatten(), overlap

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
        )
        heads = self.mtp(inputs)
        return HeadOutput([main, *heads.rows], [*stats, *heads.stats], heads.kept)

    def logits(self, tokens: Tensor, documents: Tensor | None = None) -> Tensor:
        """(B, T+1+A) -> (1+D, B, T, V) logits of every head, nan for a depth without rows. For
        tests and analysis: training never holds them.
        """
        found: list[Any] = [None] * (1 + self.depths)
        for rows in self.head_rows(tokens, documents).rows:
            logits = self.row_logits(rows)
            for depth in rows.depths:
                found[depth] = logits
        empty = torch.full_like(found[0], float("nan"))
        return torch.stack([empty if logits is None else logits for logits in found])

    @staticmethod
    def row_logits(rows: HeadRows) -> Tensor:
        """(B, t, V) logits of rows, with a gradient."""
        return opened(rows.outputs, rows.inputs, rows.outputs[-1].logits)

    def by_depth(self, output: HeadOutput) -> list[Tensor | HeadRows | None]:
        """What `head_logits` reads of depth 0..D: (B, T, C) of the main head, the rows of the
        others, None where a depth has none.
        """
        main, *heads = output.rows
        found: dict[int, HeadRows] = {depth: rows for rows in heads for depth in rows.depths}
        return [main.inputs[0], *(found.get(depth) for depth in range(1, 1 + self.depths))]

    def head_logits(self, depth: int, states: Tensor | HeadRows) -> Tensor:
        """Of some slots of `by_depth` -> (B, n, V), for model/overlap.py."""
        return self.lm_head(states) if isinstance(states, Tensor) else self.row_logits(states)

    @named("loss")
    def _head_losses(
        self, rows: list[HeadRows], targets: Tensor, row_weight: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Cross-entropy of all rows: the loss, nll and prediction (1+D, B, T)."""
        loss: Tensor = rows[0].inputs[0].new_zeros((), dtype=torch.float32)
        nll: dict[int, Tensor] = {}
        prediction: dict[int, Tensor] = {}
        for group in self._groups(rows):
            depths = [depth for one in group for depth in one.depths]
            part, own_nll, own = self._group_loss(group, targets[depths], row_weight[depths])
            loss = loss + part
            nll |= zip(depths, own_nll, strict=True)
            prediction |= zip(depths, own, strict=True)
        nothing = torch.zeros_like(nll[0]), torch.zeros_like(prediction[0])
        every = range(len(targets))
        return (
            loss,
            torch.stack([nll.get(depth, nothing[0]) for depth in every]),
            torch.stack([prediction.get(depth, nothing[1]) for depth in every]),
        )

    def _groups(self, rows: list[HeadRows]) -> list[list[HeadRows]]:
        """Rows that share one call: those of one target that the shared head scores, as long as its
        weight learns from them; every other alone.
        """
        shared = [
            one
            for one in rows
            if one.outputs == (self.lm_head,)
            and len(one.depths) == 1
            and (one.depths == (0,) or (self.mtp_config.detach != "all" and self.label_weight > 0))
        ]
        return [shared, *([one] for one in rows if not any(one is other for other in shared))]

    def _group_loss(
        self, group: list[HeadRows], targets: Tensor, row_weight: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`_head_losses` of one group. targets, row_weight: (n, B, T) of its depths."""
        outputs, several = group[0].outputs, len(group[0].depths) > 1
        inputs = [
            torch.cat([x.flatten(0, 1) for x in same])
            for same in zip(*(one.inputs for one in group), strict=True)
        ]
        if several:  # (M, n)
            aims, weights = (x.flatten(1).t() for x in (targets, row_weight))
        else:  # (M,)
            aims, weights = targets.flatten(), row_weight.flatten()
        of_heads = group[0].depths != (0,)
        constant = self.mtp_config.detach == "all" and of_heads
        if of_heads and not self.label_weight:  # only its value is wanted
            inputs = [x.detach() for x in inputs]

        def run(inputs: Sequence[Tensor], given: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
            if constant and outputs[0] is self.lm_head:
                given = [given[0].detach(), *given[1:]]
            if of_heads and not self.label_weight:
                given = [weight.detach() for weight in given]
            if isinstance(outputs[-1], LMHead):
                return linear_cross_entropy(inputs[0], given[-1], aims, weights)
            return chunked_cross_entropy(
                outputs[-1].logits, inputs, given, aims, weights, vocab_size=self.config.vocab_size
            )

        loss, nll, prediction = opened(outputs, inputs, run)
        if several:
            return (
                loss,
                nll.t().view_as(targets),
                prediction.view(targets[0].shape).expand_as(targets),
            )
        return loss, nll.view_as(targets), prediction.view_as(targets)

    @torch.no_grad()
    def evaluate(self, batch: Batch, *, blanks: int = 0) -> MTPOutput:
        """The sums of the outputs for some micro-batches, in evaluation mode; the last `blanks` do
        not count.
        """
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
        return MTPOutput(
            loss=zeros(()),
            nll_sum=zeros(heads),
            targets=zeros(heads),
            correct=zeros(heads),
            agreed=zeros(self.depths),
            compared=zeros(self.depths),
            overlap=zeros(4, self.depths),
            term_sum=zeros(len(self.terms) + len(self.objectives) * self.depths),
            term_count=zeros(len(self.terms) + len(self.objectives) * self.depths),
            balance=zeros(()),
            load=zeros(routers, self.config.n_routed_experts if routers else 1),
            nodes=zeros(routers),
        )

    def gates(self) -> list[Gate]:
        """Every router, in the order of `MTPOutput.load`: the trunk's, then those of the MTP
        modules.
        """
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
        """Only the MTP heads go on learning: no gradient into embedding, trunk, its routers and the
        output head.
        """
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
        device = self.device
        generator = torch.Generator(device).manual_seed(seed)
        for module in self.modules():
            for parameter in module.parameters(recurse=False):
                with writable(parameter):
                    if isinstance(module, RMSNorm):
                        parameter.fill_(1.0)
                        continue
                    first, count = 0, len(parameter)
                    shape, wide = (
                        parameter.shape,
                        torch.promote_types(parameter.dtype, torch.float32),
                    )
                    if isinstance(module, Experts):
                        first, shape = (
                            module.first,
                            torch.Size([self.config.n_routed_experts, *shape[1:]]),
                        )
                    values = torch.empty(shape, dtype=wide, device=device)
                    values.normal_(0.0, self.config.initializer_range, generator=generator)
                    # of another pipeline stage: on meta, not kept
                    parameter.copy_(values[first : first + count])
        for gate in self.gates():
            gate.e_score_correction_bias.zero_()


def _vector(values: Sequence[float], like: Tensor) -> Tensor:
    """Not new_tensor: on CUDA the host would wait for that copy."""
    return torch.cat([like.new_full((1,), value) for value in values])


def meta_model(config: ModelConfig, mtp: MTPConfig, *, freeze: str = "none") -> DeepseekV3MTP:
    """The model without storage, for its names, shapes and sizes. freeze: `train.freeze`."""
    with torch.device("meta"):
        model = DeepseekV3MTP(config, mtp)
    if freeze == "trunk":
        model.freeze_trunk()
    return model
