"""bench/step.py --startup: seconds from the command to the first step, by phase."""

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

from child import Child


def startup(
    config: Any, sets: list[str], options: argparse.Namespace
) -> tuple[str, dict[str, Any]]:
    """CPU seconds of each phase, medians over the rounds, each round a fresh process on random
    tokens, or on the task.

    config: a Config, that of options.config with `sets`.
    """
    phases: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        if config.data.task is None:
            sets = [*sets, *random_tokens(config.model.vocab_size, folder)]
        for number in range(options.rounds):
            own = [f"run.dir={folder}/runs", f"run.name=r{number}"]
            own += [f"train.threads={options.threads}"]
            spec = {"config": options.config, "sets": [*own, *sets]}
            child = Child("--startup", "startup_child.py", spec, limit=options.limit)
            try:
                child.start(options.threads)
                before = 0.0
                for name, at in child.answer():
                    phases.setdefault(name, []).append(at - before)
                    before = at
            finally:
                child.stop()
    medians = {name: statistics.median(times) for name, times in phases.items()}
    total = sum(seconds for name, seconds in medians.items() if name != "second step")
    rows = {**medians, "command to the end of the first step": total}
    return "\n".join(f"    {name:40}{s:>7.2f} CPU-s" for name, s in rows.items()), medians


def random_tokens(vocab_size: int, folder: str) -> list[str]:
    """Writes 50,000 tokens; the settings that read them."""
    import numpy as np

    from dsv3_mtp.data.megatron import write_index

    tokens = np.random.default_rng(0).integers(0, min(vocab_size, 1 << 16), 50_000)
    tokens.astype(np.uint16).tofile(f"{folder}/random.bin")
    write_index(Path(f"{folder}/random.idx"), np.dtype(np.uint16), np.array([len(tokens)]))
    return [f"data.train={folder}/random", f"data.val={folder}/random", "data.build=null"]
