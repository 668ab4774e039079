"""Seconds from the command to the first step, by phase: CPU seconds, medians over fresh processes.

    python bench/startup.py --config configs/v3_tiny.yaml --rounds 5

Runs on random tokens, or on the config's task.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from child import ROOT, Child, serve


def main() -> int:
    sys.path.insert(0, str(ROOT))
    from dsv3_mtp.cli.command import add_config, at_least
    from dsv3_mtp.config import load_config

    parser = argparse.ArgumentParser(description=__doc__)
    add_config(parser)
    parser.add_argument("--rounds", type=at_least(1), default=5, metavar="N")
    options = parser.parse_args()
    try:
        config = load_config(options.config, options.sets)
        print(startup(config, options.config, options.sets, options.rounds))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def startup(config: Any, file: str, sets: list[str], rounds: int) -> str:
    """The table. config: a Config, that of `file` with `sets`."""
    phases: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        if config.data.task is None:
            sets = [*sets, *random_tokens(config.model.vocab_size, folder)]
        for number in range(rounds):
            own = [f"run.dir={folder}/runs", f"run.name=r{number}", "train.threads=1"]
            child = Child("startup", "startup.py", {"config": file, "sets": [*own, *sets]})
            try:
                child.start(1)
                before = 0.0
                for name, at in child.answer():
                    phases.setdefault(name, []).append(at - before)
                    before = at
            finally:
                child.stop()
    rows = {name: statistics.median(times) for name, times in phases.items()}
    rows["command to the end of the first step"] = sum(rows.values()) - rows.get("second step", 0.0)
    return "\n".join(f"    {name:40}{s:>7.2f} CPU-s" for name, s in rows.items())


def random_tokens(vocab_size: int, folder: str) -> list[str]:
    """Writes 50,000 tokens; the settings that read them."""
    import numpy as np

    from dsv3_mtp.data.megatron import write_index

    tokens = np.random.default_rng(0).integers(0, min(vocab_size, 1 << 16), 50_000)
    tokens.astype(np.uint16).tofile(f"{folder}/random.bin")
    write_index(Path(f"{folder}/random.idx"), np.dtype(np.uint16), np.array([len(tokens)]))
    return [f"data.train={folder}/random", f"data.val={folder}/random", "data.build=null"]


def start(spec: dict) -> tuple[list, dict]:
    """The child's side: CPU seconds at the end of each phase."""
    marks = [("python", time.process_time())]

    def mark(name: str) -> None:
        marks.append((name, time.process_time()))

    from dsv3_mtp.config import load_config

    config = load_config(spec["config"], spec["sets"])
    mark("read the config")
    import torch  # noqa: F401

    mark("import torch")
    import dsv3_mtp.parallel.launch

    mark("import deepspeed")
    import dsv3_mtp.train.process

    mark("import the rest")
    trainer = dsv3_mtp.train.process.own_process(config, command=["bench"])
    mark("process group, data, model, engine")
    trainer.optimizer_step()
    mark("first step")
    trainer.optimizer_step()
    mark("second step")
    return marks, {}


if __name__ == "__main__":
    if sys.argv[1:] != ["serve"]:
        sys.exit(main())
    serve(start)
