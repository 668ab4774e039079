"""Overlap (DESIGN S14): how much of the main model's distribution the drafts have, along real text and without a draw.

Depth k at slot i and the main head at slot i+k both predict t_{i+k+1}: q_k and its teacher p. A draft from q_k is
accepted with probability sum_v min(p(v), q_k(v)) by the rejection rule (arXiv 2211.17192), given that the tokens before
it are the real text. Everything here works on hidden states and on one function

    head_logits(depth, hidden (B, n, C)) -> (B, n, V)        depth 0: the main head

chunk by chunk: the logits of all slots are never held. Shapes: B rows, T slots, C hidden_size, V vocab, D depths.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

HeadLogits = Callable[[int, Tensor], Tensor]
CHUNK_ELEMENTS = 2**22  # log-probabilities of a chunk of teachers: 16 MiB in float32, and some copies
COVERAGE = (1, 2, 4, 8)  # "top-k coverage": the main model's first choice is among so many first ones of the draft
BINS = 10  # of the draft's top probability


@dataclass(frozen=True)
class Pair:
    """The drafts of one depth at some slots, beside their teachers. Log-probabilities, at least float32."""

    depth: int
    slots: slice  # of the drafts, i
    teacher: Tensor  # (B, n, V) log p at slots i + depth
    draft: Tensor  # (B, n, V) log q at slots i

    @property
    def overlap(self) -> Tensor:
        """(B, n) sum_v min(p, q), in log space: probabilities that float32 cannot hold count too."""
        return torch.minimum(self.teacher, self.draft).logsumexp(-1).exp()


def pairs(
    head_logits: HeadLogits, hiddens: Sequence[Tensor], following: Tensor, vocab_size: int, *, temperature: float = 1.0
) -> Iterator[Pair]:
    """Every slot of every depth beside its teacher, one chunk after another.

    Args:
        hiddens: of depth 0..D, (B, T, C) each, as `head_logits` reads them.
        following: (B, D, C) of the main head: the slots behind these T, where the row goes on in another process, or
            anything: `teachers` says which of them exist. Every process makes the same calls (ZeRO-3 gathers in them).
        temperature: > 0, of both distributions.
    """
    length, depths = hiddens[0].shape[1], len(hiddens) - 1
    main = torch.cat([hiddens[0], following], dim=1)  # (B, T+D, C)
    slots = max(1, CHUNK_ELEMENTS // (vocab_size * len(main)))
    for start in range(1, length + depths, slots):
        stop = min(start + slots, length + depths)
        teacher = _log_probabilities(head_logits(0, main[:, start:stop]), temperature)
        for depth in range(1, 1 + depths):
            first, end = max(start - depth, 0), min(stop - depth, length)
            if first < end:
                draft = _log_probabilities(head_logits(depth, hiddens[depth][:, first:end]), temperature)
                yield Pair(depth, slice(first, end), teacher[:, first + depth - start : end + depth - start], draft)


def _log_probabilities(logits: Tensor, temperature: float) -> Tensor:
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return (wide / temperature).log_softmax(-1)


def teachers(valid: Tensor, following: int) -> Tensor:
    """(D, B, T) bool: the label of depth k at slot i counts, and the main head has a slot i+k.

    valid: (1+D, B, T) of `valid_targets`. following: how many slots of the row lie behind these T.
    """
    depths, length = valid.shape[0] - 1, valid.shape[2]
    slot = torch.arange(length, device=valid.device)
    exists = [slot + depth < length + following for depth in range(1, 1 + depths)]
    return valid[1:] & torch.stack(exists)[:, None] if depths else valid[1:]


@torch.no_grad()
def overlap_sums(
    head_logits: HeadLogits, hiddens: Sequence[Tensor], following: Tensor, taught: Tensor, vocab_size: int
) -> Tensor:
    """(4, D) float64, adds up over micro-batches and ranks: see `overlap_means`.

    taught: (D, B, T) from `teachers`. hiddens, following: see `pairs`.
    """
    overlap = taught.new_zeros(taught.shape, dtype=torch.float64)
    for pair in pairs(head_logits, hiddens, following, vocab_size):
        overlap[pair.depth - 1][:, pair.slots] = pair.overlap.double()
    counted = overlap.where(taught, 0.0)
    joint = taught.cumprod(0)
    sums = [counted, taught, counted.cumprod(0), joint]
    return torch.stack([part.double().sum((1, 2)) for part in sums])


def overlap_means(sums: Sequence[Sequence[float]]) -> dict[str, float]:
    """`overlap/k`, and `overlap/tokens_per_step` = 1 + sum_k mean of the product of depths 1..k, an estimate along real
    text: accepted drafts follow min(p, q), not the text. A depth without a teacher has no entry, nor then the sum.

    sums: (4, D) sum of overlaps, slots that have a teacher, sum of products, slots where depths 1..k all have one.
    """
    metrics = {f"overlap/{k}": o / n for k, (o, n) in enumerate(zip(*sums[:2], strict=True), start=1) if n}
    if sums[3] and all(sums[3]):
        products = zip(*sums[2:], strict=True)
        metrics["overlap/tokens_per_step"] = 1 + sum(product / n for product, n in products)
    return metrics


class DraftStatistics:
    """How the drafts of every depth differ from the main model, over any number of `add`.

    `metrics` gives, for depth k, over the slots that have a teacher:
        drafts/overlap/k             probability that a sampled draft is accepted
        drafts/kl/k                  KL(p to q_k), nats
        drafts/coverage_4/k          share of slots where the main model's first choice is among the draft's first 4
        drafts/ece_label/k           expected calibration error of q_k's top probability against `label == top`,
        drafts/ece_main/k            and against the main model's first choice being that token
        drafts/kept_0.3/k            share of slots with a top probability of at least 0.3: what p-min 0.3 drafts,
        drafts/accepted_0.3/k        and the share of these drafts that is accepted, sampled from q_k
        drafts/top_0.3/share/k       reliability, of the bin [0.3, 0.4): share of slots, mean top probability, share
        drafts/top_0.3/mean/k        where it is the label, and where it is the main model's first choice
        drafts/top_0.3/label/k
        drafts/top_0.3/main/k
    """

    COLUMNS = ("slots", "top", "label", "main", "overlap")

    def __init__(self, depths: int, vocab_size: int, *, temperature: float, device: torch.device):
        self.vocab_size, self.temperature = vocab_size, temperature
        self.coverage = [k for k in COVERAGE if k <= vocab_size]
        self.kl = torch.zeros(depths, dtype=torch.float64, device=device)
        self.covered = torch.zeros(depths, len(self.coverage), dtype=torch.float64, device=device)
        self.bins = torch.zeros(depths, BINS, len(self.COLUMNS), dtype=torch.float64, device=device)

    @torch.no_grad()
    def add(self, head_logits: HeadLogits, hiddens: Sequence[Tensor], tokens: Tensor, taught: Tensor) -> None:
        """One micro-batch of whole rows. tokens: (B, T+1+D); taught: (D, B, T) from `teachers`."""
        nothing = hiddens[0].new_zeros(len(tokens), len(hiddens) - 1, *hiddens[0].shape[2:])
        for pair in pairs(head_logits, hiddens, nothing, self.vocab_size, temperature=self.temperature):
            counts = taught[pair.depth - 1][:, pair.slots]
            shift = pair.depth + 1
            labels = tokens[:, pair.slots.start + shift : pair.slots.stop + shift][counts]  # (M,)
            teacher, draft, overlap = pair.teacher[counts], pair.draft[counts], pair.overlap[counts]
            self.kl[pair.depth - 1] += (teacher.exp() * (teacher - draft)).nan_to_num(0.0).sum().double()
            choice, (top, best) = teacher.argmax(-1), draft.exp().max(-1)
            first = draft.topk(max(self.coverage), dim=-1).indices == choice[:, None]  # (M, k)
            for column, k in enumerate(self.coverage):
                self.covered[pair.depth - 1, column] += first[:, :k].any(-1).sum()
            number = (top * BINS).long().clamp(max=BINS - 1)
            columns = [torch.ones_like(top), top, best == labels, best == choice, overlap]
            values = torch.stack([column.double() for column in columns], dim=-1)  # (M, columns)
            self.bins[pair.depth - 1].index_add_(0, number, values)

    def metrics(self) -> dict[str, float]:
        """See the class. A bin or depth without a slot has no entry."""
        found: dict[str, float] = {}
        for depth in range(1, 1 + len(self.kl)):
            bins = self.bins[depth - 1].cpu()
            slots, total = bins[:, 0], float(bins[:, 0].sum())
            if not total:
                continue
            found[f"drafts/overlap/{depth}"] = float(bins[:, 4].sum()) / total
            found[f"drafts/kl/{depth}"] = float(self.kl[depth - 1]) / total
            for k, covered in zip(self.coverage, self.covered[depth - 1].tolist(), strict=True):
                found[f"drafts/coverage_{k}/{depth}"] = covered / total
            for name, column in (("label", 2), ("main", 3)):
                gap = (bins[:, 1] - bins[:, column]).abs().sum()
                found[f"drafts/ece_{name}/{depth}"] = float(gap) / total
            for number in range(BINS):
                lowest = f"{number / BINS:.1f}"
                if kept := float(slots[number:].sum()):
                    found[f"drafts/kept_{lowest}/{depth}"] = kept / total
                    found[f"drafts/accepted_{lowest}/{depth}"] = float(bins[number:, 4].sum()) / kept
                if slots[number]:
                    mean = (bins[number] / slots[number]).tolist()
                    found[f"drafts/top_{lowest}/share/{depth}"] = float(slots[number]) / total
                    for name, value in zip(("mean", "label", "main"), mean[1:4], strict=True):
                        found[f"drafts/top_{lowest}/{name}/{depth}"] = value
        return found


class TableDrafters:
    """Floors of the overlap: drafters without a network, with the same main model as teacher (DESIGN S19).

    constant    the main model's mean distribution, for every slot
    table       its mean distribution behind each token: behind t_{i+k}, the token before the target, for heads that
                read tokens; behind t_i, k+1 tokens before the target, for those that do not

    A token that was seen n times gets the mean of its n distributions and one constant. They are fitted by `fit` on
    other rows than they are measured on.
    """

    MOST_ENTRIES = 2**26  # of all tables: 256 MiB

    def __init__(self, depths: int, vocab_size: int, *, reads_tokens: bool, device: torch.device):
        self.depths, self.vocab_size, self.reads_tokens = depths, vocab_size, reads_tokens
        tables = 1 if reads_tokens else depths
        self.has_tables = tables * vocab_size**2 <= self.MOST_ENTRIES
        size = (tables if self.has_tables else 0, vocab_size, vocab_size)
        self.sums = torch.zeros(size, device=device)
        self.counts = torch.zeros(size[:2], device=device)
        self.total = torch.zeros(vocab_size, dtype=torch.float64, device=device)

    @torch.no_grad()
    def fit(self, head_logits: HeadLogits, hidden: Tensor, tokens: Tensor) -> None:
        """hidden: (B, T, C) of the main head; tokens: (B, T+..) the rows."""
        length = hidden.shape[1]
        slots = max(1, CHUNK_ELEMENTS // (self.vocab_size * len(hidden)))
        for start in range(0, length, slots):
            stop = min(start + slots, length)
            p = _log_probabilities(head_logits(0, hidden[:, start:stop]), 1.0).exp().float()  # (B, n, V)
            self.total += p.sum((0, 1)).double()
            for number in range(len(self.sums)):
                back = 0 if self.reads_tokens else number + 1  # from the slot of the teacher to t_i
                first = max(start, back)
                if first < stop:
                    behind = tokens[:, first - back : stop - back].flatten()
                    self.sums[number].index_add_(0, behind, p[:, first - start :].flatten(0, 1))
                    self.counts[number].index_add_(0, behind, torch.ones_like(behind, dtype=torch.float32))

    def sums_of(self, head_logits: HeadLogits, hidden: Tensor, tokens: Tensor, taught: Tensor) -> dict[str, Tensor]:
        """`overlap_sums` of the drafters on other rows: {"constant": (4, D), "table": (4, D)}."""
        length = hidden.shape[1]
        constant = (self.total / self.total.sum()).float()
        nothing = hidden.new_zeros(len(hidden), self.depths, *hidden.shape[2:])
        behind = [tokens[:, k * self.reads_tokens :][:, :length] for k in range(1, 1 + self.depths)]

        def overlaps(draft: Callable[[int, Tensor], Tensor]) -> Tensor:
            def logits(depth: int, x: Tensor) -> Tensor:
                return head_logits(0, x) if depth == 0 else draft(depth, x).log()

            return overlap_sums(logits, [hidden, *behind], nothing, taught, self.vocab_size)

        found = {"constant": overlaps(lambda _, token: constant.expand(*token.shape, -1))}
        if self.has_tables:
            tables = (self.sums + constant) / (self.counts + 1)[..., None]
            found["table"] = overlaps(lambda k, token: tables[0 if self.reads_tokens else k - 1][token])
        return found
