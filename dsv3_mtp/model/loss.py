"""The loss of V3 section 2.2 and what is reported beside it: from the rows of all heads to
`MTPOutput`.

    L = L_main + sum_k loss_weights[k] L_k + terms of the heads + alpha L_balance  (eqs. 17, 24, 25)

`MTPLoss.__call__` reads top-down: the label's cross-entropy of every depth, the losses that a head
owns, the other objectives, the routers' balance, and the metrics. Each is a sum over slots divided
by a count of the whole optimizer step (`counts`). Shapes: B rows, T slots, D depths, V vocab, m
objectives.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dsv3_mtp.config import MTPConfig
from dsv3_mtp.config.schedules import depth_loss_weights
from dsv3_mtp.model.objective_losses import Teacher, objective_losses
from dsv3_mtp.model.output import LossSettings, MTPOutput
from dsv3_mtp.model.overlap import row_overlap
from dsv3_mtp.model.own_heads import check_counts, check_terms
from dsv3_mtp.model.states import HeadOutput, HeadRows, LMHead, Scores, opened
from dsv3_mtp.model.targets import (
    agreement,
    count_targets,
    target_tokens,
    teacher_slots,
    valid_targets,
)
from dsv3_mtp.objectives.base import checked_slots
from dsv3_mtp.objectives.draft import TV
from dsv3_mtp.ops.compute import Shard
from dsv3_mtp.ops.cross_entropy import chunked_cross_entropy, linear_cross_entropy
from dsv3_mtp.ops.ranges import named


class MTPLoss:
    """The losses of one model. heads: `DeepseekV3MTP.mtp`, None without depths."""

    def __init__(self, mtp: MTPConfig, lm_head: LMHead, heads: Any, shard: Shard):
        self.mtp, self.lm_head, self.heads, self.shard = mtp, lm_head, heads, shard
        self.depths, self.offsets, self.lookahead = mtp.depths, mtp.offsets, mtp.lookahead
        self.constant = mtp.detach == "all"  # the output head, in the losses of depth 1..D
        # of the losses that the heads own: name -> factor
        self.terms: dict[str, float] = dict(mtp.kind.terms(mtp)) if mtp.depths else {}
        # what the heads are trained on: the label's cross-entropy, with this weight, and others
        objectives = mtp.objectives
        self.label_weight = sum(weight for kind, weight in objectives if kind.cross_entropy)
        self.objectives = [(kind, weight) for kind, weight in objectives if not kind.cross_entropy]
        # what is computed beside the label's: the terms may read the overlap, which is 1 - tv
        read = bool(self.terms) and heads.overlap_in_terms
        self.compared = [*self.objectives, *([(TV(), 0.0)] if read else [])]

    def __call__(
        self,
        output: HeadOutput,
        tokens: Tensor,
        documents: Tensor | None,
        scored: Tensor | None,
        settings: LossSettings,
    ) -> MTPOutput:
        """Of one micro-batch. tokens, documents, scored: as in `DeepseekV3MTP.forward`."""
        normalizer, loss_weights = settings.normalizer, settings.loss_weights
        if normalizer is None:
            normalizer = self.counts(tokens, documents, scored)
        if loss_weights is None:
            loss_weights = depth_loss_weights(self.mtp, progress=0.0)
        # per rank: a count may be below 1 where there are fewer targets than ranks
        counts, sequences, for_terms, for_objectives = normalizer.split(
            [1 + self.depths, 1, len(self.terms), len(self.objectives) * self.depths]
        )
        targets = target_tokens(tokens, self.offsets)  # (1+D, B, T)
        valid = output.scored_slots(valid_targets(tokens, documents, self.offsets, scored))
        if self.depths:
            counts = torch.cat([counts[:1], self._denominators(counts[1:], loss_weights)])
        weights = _vector([1.0, *(self.label_weight * weight for weight in loss_weights)], counts)
        scale = weights / counts.masked_fill(counts == 0, 1)  # (1+D,)
        of_labels, nll, prediction = self._label_losses(
            output.rows, targets, scale[:, None, None] * valid
        )
        taught = teacher_slots(valid, self.offsets, self.shard.beyond(self.lookahead - 1))
        of_objectives, objective_sum, overlap = self._objective_losses(
            output.rows, targets[1:], valid, taught, loss_weights, for_objectives
        )
        scores = Scores(nll, prediction, targets, valid, taught, overlap)
        of_terms, term_sum = self._terms(output, scores, for_terms)
        balance = sum(
            (routed.balance for routed in output.routed),
            start=tokens.new_zeros((), dtype=torch.float32),
        )
        of_balance = settings.balance_loss_weight * balance / sequences[0].to(balance)
        return MTPOutput(
            loss=of_labels + of_terms + of_objectives + of_balance,
            term_sum=torch.cat([term_sum, objective_sum]),
            term_count=self.counts(tokens, documents, scored, part=True)[2 + self.depths :]
            if self.terms or self.objectives
            else counts.new_zeros(0),
            balance=balance.detach(),
            **self._metrics(output, scores, overlap=settings.overlap),
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
            own = self.heads.count_terms(self.mtp, valid, taught)
            counts.append(check_counts(self.mtp, own, len(self.terms)).double())
        if self.objectives:
            counted = self._counted(self.objectives, valid, taught)
            counts.append(counted.sum((2, 3)).flatten().double())
        return torch.cat(counts)

    def _denominators(self, counts: Tensor, loss_weights: Sequence[float]) -> Tensor:
        """What the sums of depth 1..D are divided by. counts: (.., D)."""
        return self.mtp.kind.denominators(counts, _vector(loss_weights, counts.flatten()))

    @staticmethod
    def _counted(objectives: Sequence[tuple[Any, float]], valid: Tensor, taught: Tensor) -> Tensor:
        """(m, D, B, T) bool: the slots that each of the m objectives is summed over. valid: (1+D,
        B, T); taught: (D, B, T).
        """
        return torch.stack(
            [checked_slots(kind, taught if kind.teacher else valid[1:]) for kind, _ in objectives]
        )

    @named("loss")
    def _label_losses(
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
            and (one.depths == (0,) or (not self.constant and self.label_weight > 0))
        ]
        return [shared, *([one] for one in rows if not any(one is other for other in shared))]

    def _group_loss(
        self, group: list[HeadRows], targets: Tensor, row_weight: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`_label_losses` of one group. targets, row_weight: (n, B, T) of its depths."""
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
        if of_heads and not self.label_weight:  # only its value is wanted
            inputs = [x.detach() for x in inputs]

        def run(inputs: Sequence[Tensor], given: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
            if of_heads and not self.label_weight:
                given = [weight.detach() for weight in given]
            if isinstance(outputs[-1], LMHead):
                return linear_cross_entropy(inputs[0], given[-1], aims, weights)
            return chunked_cross_entropy(
                outputs[-1].logits,
                inputs,
                given,
                aims,
                weights,
                vocab_size=self.lm_head.out_features,
            )

        with self.lm_head.held(constant=self.constant and of_heads):
            loss, nll, prediction = opened(outputs, inputs, run)
        if several:
            return (
                loss,
                nll.t().view_as(targets),
                prediction.view(targets[0].shape).expand_as(targets),
            )
        return loss, nll.view_as(targets), prediction.view_as(targets)

    def _terms(
        self, output: HeadOutput, scores: Scores, counts: Tensor
    ) -> tuple[Tensor | float, Tensor]:
        """The part of the losses that the heads own, in units of the normalizer, and their sums."""
        if not self.terms:
            return 0.0, scores.nll.new_zeros(0)
        with self.lm_head.held(self.constant):
            found = self.heads.loss_terms(output, scores)
        check_terms(self.mtp, found, self.terms)
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
        (m*D,), and the overlap (D, B, T), 0 where no term of the heads reads it.

        targets: (D, B, T); valid: (1+D, B, T); taught: (D, B, T); counts: (m*D,).
        """
        overlap = torch.zeros_like(taught, dtype=torch.float32)
        if not self.compared:
            return 0.0, counts.new_zeros(0), overlap
        kinds, shares = zip(*self.compared, strict=True)
        own, read = len(self.objectives), len(self.compared) > len(self.objectives)
        # the count of what weighs nothing does not matter
        counts = torch.cat([counts, counts.new_ones(self.depths * read)]).view(-1, self.depths)
        counts = self._denominators(counts, loss_weights)
        factors = _vector(
            [share * weight for share in shares for weight in loss_weights], counts[0]
        )
        scale = factors.view_as(counts) / counts.masked_fill(counts == 0, 1)
        count, counted = self.lookahead - 1, self._counted(self.compared, valid, taught)
        states = rows[0].inputs[0].detach()
        states = torch.cat([states, self.shard.following(states, count)], dim=1)
        ahead = tuple(offset - 1 for offset in self.offsets[1:])
        teacher = Teacher(self.lm_head, states, ahead)
        with self.lm_head.held(self.constant):
            loss, values = objective_losses(
                kinds, rows[1:], teacher, targets, scale[..., None, None] * counted
            )
        if read:
            overlap = (1 - values[-1]) * taught
        return loss, (values * counted)[:own].sum((2, 3)).flatten(), overlap

    def _metrics(self, output: HeadOutput, scores: Scores, *, overlap: bool) -> dict[str, Tensor]:
        """The fields of `MTPOutput` that no gradient flows through."""
        nll, prediction, valid, stats = scores.nll, scores.prediction, scores.valid, output.routed
        length = valid.shape[2]
        # the main head's predictions from slot 0 here to the row's end
        main = self.shard.gather(prediction[0])[:, self.shard.number * length :]
        agreed, compared = agreement(prediction, valid, main, self.offsets)
        return {
            "nll_sum": (nll * valid).sum((1, 2)),
            "targets": valid.sum((1, 2)),
            "correct": ((prediction == scores.targets) & valid).sum((1, 2)),
            "agreed": agreed,
            "compared": compared,
            "overlap": row_overlap(
                self.lm_head.head_logits,
                output.by_depth(self.depths),
                valid,
                self.shard,
                self.lm_head.out_features,
                self.offsets,
            )
            if overlap
            else nll.new_zeros(4, self.depths, dtype=torch.float64),
            "load": torch.stack([s.load for s in stats]) if stats else nll.new_zeros((0, 1)),
            "nodes": torch.stack([s.nodes for s in stats])
            if stats
            else scores.targets.new_zeros(0),
        }


def _vector(values: Sequence[float], like: Tensor) -> Tensor:
    """Not new_tensor: on CUDA the host would wait for that copy."""
    return torch.cat([like.new_full((1,), value) for value in values])
