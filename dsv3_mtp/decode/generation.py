"""How to generate, and what comes out: settings, steps and counts of accepted drafts."""

from collections.abc import Iterator
from dataclasses import dataclass, field

RECYCLE = ("last", "cycle")
REPEATS = 0.5  # share of distinct tokens below which a text repeats itself
STRETCH = 64  # tokens in a row among which they are counted: in longer ones any text repeats words
PREFILL_CHUNK = 128  # slots per forward of a prompt: bounds memory, whatever its length


@dataclass(frozen=True)
class Settings:
    """How to generate. `draft_depth` 0 is plain decoding; parallel heads draft D tokens at most,
    whatever it says.

    Temperature 0 is greedy.
    """

    max_new_tokens: int = 128
    draft_depth: int = 0
    # A row drafts no further where q_k's top probability, or the head's confidence, is below it.
    draft_threshold: float = 0.0
    recycle: str | None = None  # "last" (None) or "cycle": what drafts beyond the trained depths
    draft_vocab: tuple[int, ...] = ()  # the ids that drafts are drawn among; (): all
    # "int8": the weights that drafts alone read, on a CPU; None: as the model has them
    draft_dtype: str | None = None
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    stop_tokens: tuple[int, ...] = ()
    seed: int = 0
    prefill_chunk: int = PREFILL_CHUNK
    # torch.compile of decoding and drafting steps: a minute or more once, then faster
    compile: bool = False

    def problems(self) -> Iterator[str]:
        if self.max_new_tokens < 1:
            yield f"max_new_tokens must be >= 1 (got {self.max_new_tokens})"
        if self.draft_depth < 0:
            yield f"draft_depth must be >= 0 (got {self.draft_depth})"
        if self.recycle not in (None, *RECYCLE):
            yield f"recycle must be one of {', '.join(RECYCLE)} (got {self.recycle!r})"
        if self.draft_dtype not in (None, "int8"):
            yield f"draft_dtype must be int8, or None: the model's (got {self.draft_dtype!r})"
        if not 0 <= self.draft_threshold <= 1:
            yield f"draft_threshold must be in [0, 1] (got {self.draft_threshold})"
        if not (self.temperature == 0 or 1e-3 <= self.temperature <= 100):
            yield f"temperature must be 0: greedy, or in [0.001, 100] (got {self.temperature})"
        if self.top_k is not None and self.top_k < 1:
            yield f"top_k must be >= 1 (got {self.top_k})"
        if not 0 < self.top_p <= 1:
            yield f"top_p must be in (0, 1] (got {self.top_p})"
        if not 0 <= self.seed < 2**63:
            yield f"seed must be >= 0 and < 2^63 (got {self.seed})"
        if self.temperature == 0 and (self.top_k is not None or self.top_p < 1):
            yield "top_k and top_p have no effect at temperature 0; set a temperature or drop them"
        if self.prefill_chunk < 1:
            yield f"prefill_chunk must be >= 1 (got {self.prefill_chunk})"


@dataclass(frozen=True)
class Step:
    """What one row got from one trunk forward."""

    row: int
    tokens: list[int]  # new tokens, at least one; a stop token is the last one
    accepted: int  # the first `accepted` of them were drafts
    # drafts that were put to the test: behind a stop token or the limit there is nothing to test
    drafted: int
    done: bool


@dataclass
class Acceptance:
    """Counts over decode steps, by draft position 1..K."""

    tried: list[int] = field(default_factory=list)  # steps in which position k was put to the test
    kept: list[int] = field(default_factory=list)  # ... and drafts 1..k all stood
    reached: list[int] = field(default_factory=list)  # ... and drafts 1..k-1 all stood
    steps: int = 0  # trunk forwards per row, without the prefill
    tokens: int = 0  # tokens from them

    def add(self, step: Step) -> None:
        while len(self.tried) < step.drafted:
            for counts in (self.tried, self.kept, self.reached):
                counts.append(0)
        for k in range(step.drafted):
            self.tried[k] += 1
            self.reached[k] += step.accepted >= k
            self.kept[k] += step.accepted > k
        self.steps += 1
        self.tokens += len(step.tokens)

    @property
    def joint(self) -> list[float]:
        """P(drafts 1..k all accepted) for k = 1..K."""
        return [kept / max(tried, 1) for kept, tried in zip(self.kept, self.tried, strict=True)]

    @property
    def conditional(self) -> list[float]:
        """P(draft k accepted | drafts 1..k-1 accepted)."""
        return [
            kept / max(reached, 1) for kept, reached in zip(self.kept, self.reached, strict=True)
        ]

    @property
    def tokens_per_step(self) -> float:
        """1 + accepted, the convention of FastMTP, Nemotron and Meta's tables."""
        return self.tokens / max(self.steps, 1)


@dataclass
class Generation:
    """Result of `generate`."""

    tokens: list[list[int]]  # new tokens of each prompt
    acceptance: Acceptance

    @property
    def distinct(self) -> float:
        """Share of distinct tokens, of each STRETCH in a row; mean over the texts. One that repeats
        itself accepts every draft.
        """
        counts = (
            sum(len(set(row[start : start + STRETCH])) for start in range(0, len(row), STRETCH))
            for row in self.tokens
        )
        shares = [count / len(row) for count, row in zip(counts, self.tokens, strict=True)]
        return sum(shares) / len(shares)

    def add(self, step: Step) -> None:
        if self.tokens[step.row]:  # the first token of a row comes from its prefill
            self.acceptance.add(step)
        self.tokens[step.row] += step.tokens


def repetition(distinct: float) -> str | None:
    """What is to be said of generated text with this share of distinct tokens; None: nothing."""
    if distinct >= REPEATS:
        return None
    return (
        f"the generated text repeats itself (share of distinct tokens {distinct:.2f}, below "
        f"{REPEATS:g}), and how many drafts it accepts says nothing of other text: compare the "
        "overlap, which dsv3 evaluate measures along real text"
    )
