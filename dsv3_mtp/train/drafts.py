"""What drafts are worth along real text, without a draw: how they differ from the main model, and
what drafters without a network reach with the same main model.

Shapes: B rows, T slots, C hidden_size, V vocab, D depths.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dsv3_mtp.model.overlap import (
    HeadLogits,
    States,
    chunks,
    log_probabilities,
    pairs,
    slot_overlaps,
)

# The main model's first choice is among so many first ones of the draft.
COVERAGE = (1, 2, 4, 8)
BINS = 10  # of the draft's top probability


class DraftStatistics:
    """How the drafts of every depth differ from the main model, over any number of `add`.

    `metrics` gives, for depth k, over the slots that have a teacher:
        drafts/overlap/k       probability that a sampled draft is accepted
        drafts/kl/k            KL(p to q_k), nats
        drafts/coverage_4/k    share of slots where the main model's first choice is among the
                               draft's first 4
        drafts/ece_label/k     expected calibration error of q_k's top probability as the
                               probability that this token is the label,
        drafts/ece_main/k      and that it is the main model's first choice
        drafts/confidence/k    the mean of what the head itself gives for the overlap, if it does,
        drafts/ece_confidence/k  and its calibration error as the overlap
        drafts/kept_0.3/k      share of slots with a top probability of at least 0.3: what a p-min
                               of 0.3 drafts,
        drafts/accepted_0.3/k  and the share of these that is accepted, drawn from q_k
        drafts/top_0.3/NAME/k  reliability, of the slots whose top probability is in [0.3, 0.4):
                               their share, mean top probability, and how often that token is the
                               label, and the main model's first choice (share, mean, label, main)
    """

    COLUMNS = ("slots", "top", "label", "main", "overlap")

    def __init__(
        self,
        offsets: Sequence[int],
        vocab_size: int,
        *,
        temperature: float,
        device: torch.device,
        outside: Tensor | None = None,
    ):
        """offsets: of depth 1..D; outside: (V,) bool, the tokens that no draft is; KL is then
        infinite, and left out.
        """
        self.vocab_size, self.temperature, self.outside = vocab_size, temperature, outside
        self.offsets, depths = (1, *offsets), len(offsets)
        self.coverage = [k for k in COVERAGE if k <= vocab_size]
        self.kl = torch.zeros(depths, dtype=torch.float64, device=device)
        self.covered = torch.zeros(depths, len(self.coverage), dtype=torch.float64, device=device)
        self.bins = torch.zeros(depths, BINS, len(self.COLUMNS), dtype=torch.float64, device=device)
        # by the head's own confidence: sums of it, and of the overlap
        self.confidence = torch.zeros(depths, BINS, 2, dtype=torch.float64, device=device)

    @torch.no_grad()
    def add(
        self,
        head_logits: HeadLogits,
        hiddens: Sequence[States],
        tokens: Tensor,
        taught: Tensor,
        confidence: Tensor | None = None,
    ) -> None:
        """One micro-batch of whole rows. tokens: (B, T+1+D); taught: (D, B, T) from `teachers`;
        confidence: (D, B, T), see `Head.confidence`.
        """
        main: Any = hiddens[0]
        nothing = main.new_zeros(len(tokens), max(self.offsets) - 1, *main.shape[2:])
        for pair in pairs(
            head_logits,
            hiddens,
            nothing,
            self.vocab_size,
            self.offsets,
            temperature=self.temperature,
            outside=self.outside,
        ):
            counts = taught[pair.depth - 1][:, pair.slots]
            shift = self.offsets[pair.depth]
            labels = tokens[:, pair.slots.start + shift : pair.slots.stop + shift][counts]  # (M,)
            teacher, draft, overlap = pair.teacher[counts], pair.draft[counts], pair.overlap[counts]
            self.kl[pair.depth - 1] += (
                (teacher.exp() * (teacher - draft)).nan_to_num(0.0).sum().double()
            )
            choice, (top, best) = teacher.argmax(-1), draft.exp().max(-1)
            first = draft.topk(max(self.coverage), dim=-1).indices == choice[:, None]  # (M, k)
            for column, k in enumerate(self.coverage):
                self.covered[pair.depth - 1, column] += first[:, :k].any(-1).sum()
            number = (top * BINS).long().clamp(max=BINS - 1)
            columns = [torch.ones_like(top), top, best == labels, best == choice, overlap]
            values = torch.stack([column.double() for column in columns], dim=-1)  # (M, columns)
            self.bins[pair.depth - 1].index_add_(0, number, values)
            if confidence is not None:
                sure = confidence[pair.depth - 1][:, pair.slots][counts]
                values = torch.stack([sure, overlap], dim=-1).double()
                number = (sure * BINS).long().clamp(max=BINS - 1)
                self.confidence[pair.depth - 1].index_add_(0, number, values)

    def metrics(self) -> dict[str, float]:
        """See the class. A bin or depth without a slot has no entry."""
        found: dict[str, float] = {}
        for depth in range(1, 1 + len(self.kl)):
            bins = self.bins[depth - 1].cpu()
            slots, total = bins[:, 0], float(bins[:, 0].sum())
            if not total:
                continue
            found[f"drafts/overlap/{depth}"] = float(bins[:, 4].sum()) / total
            if self.outside is None:
                found[f"drafts/kl/{depth}"] = float(self.kl[depth - 1]) / total
            for k, covered in zip(self.coverage, self.covered[depth - 1].tolist(), strict=True):
                found[f"drafts/coverage_{k}/{depth}"] = covered / total
            for name, column in (("label", 2), ("main", 3)):
                gap = (bins[:, 1] - bins[:, column]).abs().sum()
                found[f"drafts/ece_{name}/{depth}"] = float(gap) / total
            sure = self.confidence[depth - 1].cpu()
            if sure.any():
                found[f"drafts/confidence/{depth}"] = float(sure[:, 0].sum()) / total
                gap = (sure[:, 0] - sure[:, 1]).abs().sum()
                found[f"drafts/ece_confidence/{depth}"] = float(gap) / total
            for number in range(BINS):
                lowest = f"{number / BINS:.1f}"
                if kept := float(slots[number:].sum()):
                    found[f"drafts/kept_{lowest}/{depth}"] = kept / total
                    found[f"drafts/accepted_{lowest}/{depth}"] = (
                        float(bins[number:, 4].sum()) / kept
                    )
                if slots[number]:
                    mean = (bins[number] / slots[number]).tolist()
                    found[f"drafts/top_{lowest}/share/{depth}"] = float(slots[number]) / total
                    for name, value in zip(("mean", "label", "main"), mean[1:4], strict=True):
                        found[f"drafts/top_{lowest}/{name}/{depth}"] = value
        return found


class TableDrafters:
    """Floors of the overlap: drafters without a network, with the same main model as teacher.

    constant    the main model's mean distribution, for every slot
    table       its mean distribution behind each token: behind t_{i+k}, the token before the
                target, for heads that read tokens; behind t_i, k+1 tokens before the target, for
                those that do not

    A token that was seen n times gets the mean of its n distributions and one constant. They are
    fitted by `fit` on other rows than they are measured on.
    """

    MOST_ENTRIES = 2**26  # of all tables: 256 MiB

    def __init__(
        self, reads: Sequence[int], offsets: Sequence[int], vocab_size: int, *, device: torch.device
    ):
        """Depth k = 1.. has read up to t_{i+reads[k-1]} and predicts t_{i+offsets[k-1]}."""
        self.vocab_size, self.reads, self.offsets = vocab_size, reads, (1, *offsets)
        # from the slot of the teacher back to the last token that was read; a table for each
        backs = [offset - 1 - read for read, offset in zip(reads, offsets, strict=True)]
        self.backs = sorted(set(backs))
        self.table_of = [self.backs.index(back) for back in backs]
        tables = len(self.backs)
        self.has_tables = tables * vocab_size**2 <= self.MOST_ENTRIES
        size = (tables if self.has_tables else 0, vocab_size, vocab_size)
        self.sums = torch.zeros(size, device=device)
        self.counts = torch.zeros(size[:2], device=device)
        self.total = torch.zeros(vocab_size, dtype=torch.float64, device=device)

    @torch.no_grad()
    def fit(self, head_logits: HeadLogits, hidden: Tensor, tokens: Tensor) -> None:
        """hidden: (B, T, C) of the main head; tokens: (B, T+..) the rows."""
        length = hidden.shape[1]
        for start, stop in chunks(0, length, len(hidden), self.vocab_size):
            logits = head_logits(0, hidden[:, start:stop])
            p = log_probabilities(logits, 1.0).exp().float()  # (B, n, V)
            self.total += p.sum((0, 1)).double()
            for number, back in enumerate(self.backs if self.has_tables else ()):
                first = max(start, back)
                if first < stop:
                    behind = tokens[:, first - back : stop - back].flatten()
                    self.sums[number].index_add_(0, behind, p[:, first - start :].flatten(0, 1))
                    self.counts[number].index_add_(
                        0, behind, torch.ones_like(behind, dtype=torch.float32)
                    )

    def overlaps(
        self, head_logits: HeadLogits, hidden: Tensor, tokens: Tensor, taught: Tensor
    ) -> dict[str, Tensor]:
        """`slot_overlaps` of the drafters on other rows: {"constant": (D, B, T), "table": ...}."""
        length = hidden.shape[1]
        constant = (self.total / self.total.sum()).float()
        nothing = hidden.new_zeros(len(hidden), max(self.offsets) - 1, *hidden.shape[2:])
        behind = [tokens[:, read:][:, :length] for read in self.reads]

        def along(draft: Callable[[int, Tensor], Tensor]) -> Tensor:
            def logits(depth: int, x: Tensor) -> Tensor:
                return head_logits(0, x) if depth == 0 else draft(depth, x).log()

            states = [hidden, *behind]
            return slot_overlaps(logits, states, nothing, taught, self.vocab_size, self.offsets)

        found = {"constant": along(lambda _, token: constant.expand(*token.shape, -1))}
        if self.has_tables:
            tables = (self.sums + constant) / (self.counts + 1)[..., None]
            found["table"] = along(lambda k, token: tables[self.table_of[k - 1]][token])
        return found
