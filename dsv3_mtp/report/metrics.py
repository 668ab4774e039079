"""Numbers of a run: the metrics.jsonl log, the training clock, model FLOP utilisation.

One record is one flat dict and one line of metrics.jsonl. No torch here.
"""

import json
import math
import re
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NotRequired

from pydantic import with_config
from typing_extensions import TypedDict

from dsv3_mtp.files.atomic import naming_file, sync, write_text
from dsv3_mtp.files.checked import OPEN, parse_json

Record = Mapping[str, Any]
# Depth k predicts a token that is k+1 ahead. The main head predicts the same token later, from more
# of the text. A depth whose loss is below this share of the main loss has probably read its target.
LEAK_RATIO = 0.8


@with_config(OPEN)
class Line(TypedDict):
    """What every line of metrics.jsonl has; the other keys are metrics."""

    step: int
    tokens: NotRequired[int]
    progress: NotRequired[float]
    time_s: NotRequired[float]


class MetricsLog:
    """Append-only JSONL file of flat records; a line is whole or absent, also after a kill.

    Non-finite numbers are written as the strings "nan", "inf", "-inf" (JSON has no such numbers)
    and come back from `read_metrics` as floats. An existing file is continued, its half-written
    last line is cut off.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            self._rewrite(_whole_lines(self.path))

    @classmethod
    def after(cls, path: Path, step: int) -> "MetricsLog":
        """The log of a run that goes on after this step. For one rank alone: another that opened it
        a moment later would bring back what was dropped, or lose what has come since.
        """
        log = cls(path)
        log.truncate_after(step)
        return log

    def append(self, record: Record) -> None:
        """Write one record. TypeError: a value is not a number, string, bool or None."""
        encoded = {key: _encode(key, value) for key, value in record.items()}
        line = json.dumps(encoded, allow_nan=False)
        with naming_file(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def sync(self) -> None:
        """Puts what was appended on the disk, so that no line is behind a checkpoint's."""
        if self.path.exists():
            sync(self.path)

    def truncate_after(self, step: int) -> None:
        """Drop the records of later steps, which a resumed run is about to repeat."""
        if self.path.exists():
            lines = _whole_lines(self.path)
            kept = [n for n, record in enumerate(read_metrics(self.path)) if record["step"] <= step]
            self._rewrite([lines[n] for n in kept])

    def _rewrite(self, lines: list[str]) -> None:
        write_text(self.path, "".join(line + "\n" for line in lines))


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Records of a metrics.jsonl in file order, less a half-written last line.

    ValueError: any other line is not a JSON object with a step.
    """
    records = []
    for number, line in enumerate(_whole_lines(Path(path)), start=1):
        try:
            record = parse_json(line, Line)
            if nested := [key for key, value in record.items() if isinstance(value, dict | list)]:
                raise ValueError(f"{nested[0]} is no number")
        except ValueError as error:
            text = f"not a JSON object of metrics ({error}); delete this line"
            raise ValueError(f"{path}:{number}: {text}") from None
        records.append({key: _decode(value) for key, value in record.items()})
    return records


def _whole_lines(path: Path) -> list[str]:
    # a line is written with its newline in one call: what follows the last one was cut off
    return path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]


def _encode(key: str, value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(float(value))
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    text = "is not a number or string; convert it, e.g. with .item()"
    raise TypeError(f"metric {key}: {type(value).__name__} {text}")


def _decode(value: Any) -> Any:
    return float(value) if value in ("nan", "inf", "-inf") else value


def depths_of(record: Record, key: str) -> list[int]:
    """Depths k for which the record has `key/k`, in order: [1, 2] for mtp_loss/1 and mtp_loss/2."""
    ends = (end for start, _, end in (name.rpartition("/") for name in record) if start == key)
    return sorted(int(end) for end in ends if end.isdecimal())


class Clock:
    """Seconds spent training over the whole life of a run, restarts included and pauses excluded.

    >>> clock.load_state_dict(saved); clock.start()
    >>> with clock.paused(): evaluate()
    >>> record["time_s"], record["perf/tokens_per_s"] = clock.seconds, clock.lap(tokens_so_far)
    """

    def __init__(self, *, now: Callable[[], float] = time.perf_counter, window: int = 20) -> None:
        self._now = now
        self._before = 0.0  # seconds up to the last start or pause
        self._since: float | None = None
        self._lap: tuple[float, int] | None = None  # training seconds, tokens
        self._recent = deque[tuple[float, int]](maxlen=window + 1)  # wall-clock seconds, tokens

    def start(self, tokens: int = 0) -> None:
        """Begin counting; the first lap counts from `tokens`, consumed before this start."""
        self._since = self._now()
        self._lap = (self.seconds, tokens)
        self._recent.append((self._since, tokens))

    @property
    def seconds(self) -> float:
        """Training seconds so far."""
        return self._before + (self._now() - self._since if self._since is not None else 0.0)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Do not count what happens inside (evaluation, checkpointing)."""
        self._before, self._since = self.seconds, None
        try:
            yield
        finally:
            self._since = self._now()

    def lap(self, tokens: int) -> float:
        """Tokens per training second since the last lap; `tokens` is the total consumed so far."""
        assert self._lap is not None, "start() the clock first"
        seconds, previous = self.seconds - self._lap[0], tokens - self._lap[1]
        self._lap = (self.seconds, tokens)
        self._recent.append((self._now(), tokens))
        return previous / max(seconds, 1e-9)

    def eta(self, tokens_left: int) -> float | None:
        """Seconds to the end at the pace of the recent laps, pauses included; None before a lap."""
        (first, tokens), (last, tokens_now) = self._recent[0], self._recent[-1]
        if tokens_now <= tokens:
            return None
        return tokens_left * (last - first) / (tokens_now - tokens)

    def state_dict(self) -> dict[str, float]:
        return {"seconds": self.seconds}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        self._before = state["seconds"]


# Dense bf16 tensor-core peaks in FLOP/s, from NVIDIA's data sheets and architecture papers (what
# they print "with sparsity" is twice this). The first pattern found in the device name counts:
# slower boards first.
PEAK_FLOPS = (
    (r"\bGB[23]00\b", 2500e12),
    (r"\bB[23]00\b", 2250e12),
    (r"\bH200 NVL\b", 835e12),
    (r"\bG?H200\b", 989e12),
    (r"\bH20\b", 148e12),
    (r"\bH100 NVL\b", 835e12),
    (r"\bH100 PCIe\b", 756e12),
    (r"\bH[18]00\b", 989e12),
    (r"\bA[18]00\b", 312e12),
    (r"\bL40S\b", 362e12),
    (r"\bRTX 4090\b", 165e12),
)


def peak_flops(device_name: str) -> float | None:
    """Peak dense bf16 FLOP/s by torch.cuda.get_device_name(); None: unknown, as of every CPU."""
    return next((flops for pattern, flops in PEAK_FLOPS if re.search(pattern, device_name)), None)


def mfu(
    tokens_per_s: float, flops_per_token: float, device_name: str, num_devices: int
) -> float | None:
    """Model FLOP utilisation: FLOPs that the model needs over the peak; None: unknown."""
    peak = peak_flops(device_name)
    return None if peak is None else tokens_per_s * flops_per_token / (peak * num_devices)
