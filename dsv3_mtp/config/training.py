"""How the weights learn: the `optim` and `train` sections.

"V3" is arXiv 2412.19437; numbers in brackets are DeepSeek-V3's own. Fractions are of
train.total_tokens, so that a recipe carries over to any run length.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import Annotated, Literal

from pydantic import Field

from dsv3_mtp.config.model import V3_TOKENS
from dsv3_mtp.config.reader import Problem
from dsv3_mtp.config.section import (
    Count,
    FilePath,
    Fraction,
    NotNegative,
    Number,
    OnResume,
    Positive,
    Section,
)


class ScheduleConfig(Section):
    """Learning rate over progress (V3 4.2): warm-up, constant, cosine, constant, low constant."""

    warmup: Fraction = 0.0084
    """End of the linear warm-up (2K of about 240K steps)."""
    decay_start: Fraction = 10e12 / V3_TOKENS
    """Start of the cosine."""
    decay_end: Fraction = 14.3e12 / V3_TOKENS
    """End of the cosine."""
    decay_ratio: Fraction = 0.1
    """Rate after the cosine, over lr (2.2e-5 / 2.2e-4)."""
    final_start: Fraction = 14.633e12 / V3_TOKENS
    """Start of the last stage."""
    final_ratio: Fraction = 7.3e-6 / 2.2e-4
    """Rate of the last stage, over lr."""

    def rules(self) -> Iterator[Problem]:
        order = ("warmup", "decay_start", "decay_end", "final_start")
        for before, after in pairwise(order):
            if getattr(self, before) > getattr(self, after):
                text = f"must be >= {before} = {getattr(self, before)} (got {getattr(self, after)})"
                yield after, text


Decay = Annotated[Number, Field(ge=0, lt=1)]


class OptimConfig(Section):
    """AdamW (V3 4.2)."""

    on_resume = OnResume.RECORDED

    lr: Positive = 2.2e-4
    """Peak learning rate."""
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    """Decay of the first and second moment."""
    eps: Positive = 1e-8
    """Added to the root of the second moment."""
    weight_decay: NotNegative = 0.1
    """Decoupled weight decay of matrices."""
    grad_clip: NotNegative = 1.0
    """Largest global gradient norm; 0: no clipping."""
    moments: Literal["float32", "bfloat16"] = "float32"
    """How the two moments are kept (V3 3.3.3: bfloat16); masters are float32 with both."""
    schedule: ScheduleConfig = ScheduleConfig()


class BatchSizeRamp(Section):
    """Batch size grows linearly from `start` to train.batch_size at `until` (V3 4.2)."""

    start: Count
    """Sequences per step at the start (V3: 3072)."""
    until: Annotated[Number, Field(gt=0, le=1)]
    """Fraction at which train.batch_size is reached (V3: 469B of 14.8T tokens = 0.0317)."""


Recomputed = Literal["none", "selective", "full"]


class TrainConfig(Section):
    """How long, how wide and in which numbers."""

    on_resume = OnResume.RECORDED

    total_tokens: Count
    """Length of the run (V3 4.2: 14.8e12). Progress is tokens consumed over this."""
    batch_size: Count
    """Sequences per optimizer step over all ranks (V3: 15360)."""
    micro_batch_size: Annotated[Count, OnResume.FREE]
    """Sequences per forward of a rank, or of the sequence_parallel_size ranks that share them."""
    batch_size_ramp: BatchSizeRamp | None = None
    """null: batch_size from the first step."""
    dtype: Annotated[Literal["float32", "bfloat16"], OnResume.FIXED] = "bfloat16"
    """Weights and activations in the forward; master weights are float32 (V3 3.3)."""
    activation_checkpointing: Annotated[Recomputed, OnResume.FREE] = "none"
    """What backward recomputes. selective: norms, MLA up-projections (V3 3.2.3); full: blocks."""
    bias_update_speed: NotNegative = 0.001
    """Router bias step gamma (V3 2.1.2, 4.2)."""
    bias_update_until: Fraction = 14.3e12 / V3_TOKENS
    """Fraction from which gamma is 0 (V3 4.2: after 14.3T tokens)."""
    balance_loss_weight: NotNegative = 0.0001
    """alpha of the sequence-wise balance loss (V3 eq. 17, 4.2)."""
    threads: Annotated[Count | None, OnResume.FREE] = None
    """CPU threads per rank; null: cores over ranks of this host."""
    init_from: FilePath | None = None
    """Folder in DeepSeek-V3's layout, for weights and router biases at step 0; null: random."""
    freeze: Annotated[Literal["none", "trunk"], OnResume.FIXED] = "none"
    """trunk: only the heads learn; embedding, trunk with its router biases and output head stay."""
    ema_decay: Annotated[Number, Field(gt=0, lt=1)] | None = None
    """Decay per step of an average of the weights, kept in host memory (V3 3.2.2); null: none."""

    def rules(self) -> Iterator[Problem]:
        of = f"must be a multiple of train.micro_batch_size = {self.micro_batch_size}"
        if self.batch_size % self.micro_batch_size:
            yield "batch_size", f"{of} (got {self.batch_size})"
        if self.batch_size_ramp is not None:
            start = self.batch_size_ramp.start
            if start % self.micro_batch_size:
                yield "batch_size_ramp.start", f"{of} (got {start})"
            if start > self.batch_size:
                text = f"must be <= train.batch_size = {self.batch_size} (got {start})"
                yield "batch_size_ramp.start", text
