"""A profiler's trace of a few optimizer steps: `dsv3 train --profile steps=10:13`."""

import re
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from dsv3_mtp.ops import ranges


def parse_steps(text: str) -> range:
    """ "steps=10:13" -> the steps 10, 11, 12 and 13.

    Raises:
        ValueError: it is written in another way, or names no step.
    """
    found = re.fullmatch(r"steps=(\d+):(\d+)", text)
    if not found:
        raise ValueError(f"--profile {text}: write steps=FIRST:LAST, as in steps=10:13")
    first, last = int(found[1]), int(found[2])
    if not 1 <= first <= last:
        raise ValueError(f"--profile {text}: must be 1 <= FIRST <= LAST; steps count from 1")
    return range(first, last + 1)


def require_within(steps: range, total: int) -> None:
    """Raises ValueError: a run of `total` steps ends before those that are to be profiled."""
    if steps and steps.start > total:
        asked = f"--profile steps={steps.start}:{steps.stop - 1}"
        raise ValueError(f"{asked}: the run has {total} steps")


class StepProfile:
    """Records the steps of a range into FOLDER/trace.rankR.json.gz, for chrome://tracing or
    Perfetto. A run that ends earlier writes what there is.
    """

    def __init__(self, steps: range, folder: Path, rank: int):
        self.steps, self.path = steps, folder / f"trace.rank{rank}.json.gz"
        self.active: Any = None

    def step(self, number: int) -> AbstractContextManager[Any]:
        """Around the optimizer step of this number, the first being 1."""
        if self.active is None and number == self.steps.start:
            activities = [ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(ProfilerActivity.CUDA)
            self.active = profile(activities=activities)
            self.active.start()
            ranges.recording = True
        elif self.active is not None and number == self.steps.stop:
            self.close()
        recorded = self.active is not None
        return torch.profiler.record_function(f"step {number}") if recorded else nullcontext()

    def close(self) -> None:
        """Writes the trace, if one was begun."""
        if self.active is None:
            return
        ranges.recording = False
        self.active.stop()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.active.export_chrome_trace(str(self.path))
        self.active = None
