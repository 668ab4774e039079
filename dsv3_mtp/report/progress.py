"""What a run shows while it runs: lines made of logged records, and a live bar. No torch."""

import math
import os
import sys
from collections.abc import Sequence
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn
from rich.progress import Progress as LiveBar

from dsv3_mtp.report.metrics import Record, depths_of

WIDTH = 100  # columns
SEPARATOR = " | "


def train_line(record: Record, *, total_steps: int, eta_s: float | None) -> str:
    """A record with train/* keys:

    step  120/1465 | main 3.101 mtp 3.118 w 0.300 agr 0.41 | lr 2.7e-3 gn 0.82 | 1.84k tok/s | eta -
    """
    width = len(str(total_steps))
    losses = f"main {record['train/main_loss']:.3f}"
    if depths := _by_depth(record, "train/mtp_loss", ".3f"):
        losses += f" mtp {depths} w {record['train/mtp_weight']:.3f}"
    if agreement := _by_depth(record, "train/agreement", ".2f"):
        losses += f" agr {agreement}"
    optimizer = f"lr {_scientific(record['optim/lr'])} gn {record['optim/grad_norm']:.2f}"
    speed = f"{quantity(record['perf/tokens_per_s'])} tok/s"
    if "perf/mfu" in record:
        speed += f" mfu {record['perf/mfu']:.1%}"
    if "perf/peak_gib" in record:
        speed += f" mem {record['perf/peak_gib']:.1f} GiB"
    step = f"step {record['step']:{width}d}/{total_steps}"
    return SEPARATOR.join([step, losses, optimizer, speed, f"eta {duration(eta_s)}"])


def validation_line(record: Record, *, total_steps: int) -> str:
    """A record with val/* keys, as `train_line`:

    val  step  200 | main 3.010 (bpb 1.230) mtp 3.104 | top1 0.41 0.36 | overlap 0.62
    """
    losses = f"main {record['val/main_loss']:.3f}"
    if "val/bits_per_byte" in record:
        losses += f" (bpb {record['val/bits_per_byte']:.3f})"
    if depths := _by_depth(record, "val/mtp_loss", ".3f"):
        losses += f" mtp {depths}"
    fields = [f"val  step {record['step']:{len(str(total_steps))}d}", losses]
    for name in ("top1", "agreement", "overlap"):
        if values := _by_depth(record, f"val/{name}", ".2f"):
            fields.append(f"{name} {values}")
    if "task/exact_match" in record:
        fields.append(f"exact match {record['task/exact_match']:.3f}")
    return SEPARATOR.join(fields)


def fit(line: str) -> str:
    """For a person at a terminal: its fields in lines of at most WIDTH columns (one field may be
    wider).
    """
    first, *others = line.split(SEPARATOR)
    lines = [first]
    for field in others:
        if len(lines[-1]) + len(SEPARATOR) + len(field) <= WIDTH:
            lines[-1] += SEPARATOR + field
        else:
            lines.append(f"   {SEPARATOR}{field}")
    return "\n".join(lines)


def floors_line(record: Record) -> str:
    """One line for a record with val/floor/* keys:

    floors, nats per token: unigram 5.310 bigram 3.830 trigram 3.430 (tables of the tokens trained
    on)
    """
    names = ("unigram", "bigram", "trigram")
    floors = " ".join(f"{name} {record[f'val/floor/{name}']:.3f}" for name in names)
    return f"floors, nats per token: {floors} (tables of the tokens trained on)"


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of cells as lines with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in rows)
    return [line.rstrip() for line in lines]


def duration(seconds: float | None) -> str:
    """0:01:12, or 2d 03:04:05; "-" when unknown."""
    if seconds is None or not math.isfinite(seconds):
        return "-"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    clock = f"{minute:02d}:{second:02d}"
    return f"{days}d {hour:02d}:{clock}" if days else f"{hour}:{clock}"


def quantity(value: float) -> str:
    """Three significant digits with a unit: 950, 9.84k, 3.00M, 14.8T."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= 0.9995 * size:
            scaled = value / size
            return f"{scaled:.{max(0, 2 - int(math.log10(max(abs(scaled), 1))))}f}{unit}"
    return f"{value:.0f}"


def _scientific(value: float) -> str:
    mantissa, _, exponent = f"{value:.1e}".partition("e")
    return f"{mantissa}e{int(exponent)}" if exponent else mantissa


def _by_depth(record: Record, key: str, spec: str) -> str:
    return " ".join(format(record[f"{key}/{depth}"], spec) for depth in depths_of(record, key))


class Progress:
    """Lines about a run on stdout; in a `with`, on a terminal, with a live bar below them.

    Without a terminal, or with NO_COLOR set, it writes plain lines and no control characters.
    """

    def __init__(
        self,
        total_tokens: int,
        *,
        total_steps: int,
        stream: TextIO | None = None,
        silent: bool = False,
    ) -> None:
        """silent: shows nothing, for ranks other than the first."""
        self._stream, self._silent = stream if stream is not None else sys.stdout, silent
        self._total_steps = total_steps
        self._bar: LiveBar | None = None
        plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
        if not silent and self._stream.isatty() and not plain:
            columns = (BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[note]}"))
            how: Any = {"console": Console(file=self._stream), "refresh_per_second": 2}
            self._bar = LiveBar(TextColumn("training"), *columns, **how)
            self._task = self._bar.add_task("training", total=total_tokens, note="")

    def __enter__(self) -> "Progress":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, *, step: int, tokens: int, eta_s: float | None) -> None:
        """Move the live bar; to be called after every step."""
        if self._bar is not None:
            note = f"step {step}/{self._total_steps}  eta {duration(eta_s)}"
            self._bar.update(self._task, completed=tokens, note=note)

    def train(self, record: Record, *, eta_s: float | None) -> None:
        self._line(train_line(record, total_steps=self._total_steps, eta_s=eta_s))

    def validation(self, record: Record) -> None:
        self._line(validation_line(record, total_steps=self._total_steps))

    def _line(self, line: str) -> None:
        """In a file a step is one line, whatever its length."""
        self.say(fit(line) if not self._silent and self._stream.isatty() else line)

    def say(self, text: str) -> None:
        """Any other line (resumed, checkpoint saved), above the bar."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        elif not self._silent:
            print(text, file=self._stream, flush=True)
