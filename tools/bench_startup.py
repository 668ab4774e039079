"""tools/bench.py --startup: seconds from the command to the first step, by phase."""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench_process import last_words, python_path

STARTUP = """
import sys, time
marks = [("python", time.process_time())]
def mark(name): marks.append((name, time.process_time()))
from dsv3_mtp.config import load_config
config = load_config(sys.argv[1], sys.argv[2:]); mark("read the config")
import torch; mark("import torch")
import dsv3_mtp.parallel.launch; mark("import deepspeed")
import dsv3_mtp.train.trainer; mark("import the rest")
trainer = dsv3_mtp.train.trainer.Trainer(config, command=["bench"]); mark("process group, data, model, engine")
trainer.log.append = lambda record: None
trainer.optimizer_step(); mark("first step")
trainer.optimizer_step(); mark("second step")
import json, os
print("MARKS", json.dumps(marks), flush=True); os._exit(0)
"""


def startup(
    config: Any, sets: list[str], options: argparse.Namespace
) -> tuple[str, dict[str, Any]]:
    """CPU seconds of each phase, medians over the rounds, each round a fresh process on random
    tokens, or on the task.

    config: a Config, that of options.config with `sets`.
    """
    import numpy as np

    from dsv3_mtp.data.megatron import write_index

    phases: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        ids = min(config.model.vocab_size, 1 << 16)
        tokens = np.random.default_rng(0).integers(0, ids, 50_000).astype(np.uint16)
        tokens.tofile(f"{folder}/random.bin")
        write_index(Path(f"{folder}/random.idx"), tokens.dtype, np.array([len(tokens)]))
        for number in range(options.rounds):
            own = [
                f"run.dir={folder}/runs",
                f"run.name=r{number}",
                f"train.threads={options.threads}",
            ]
            if config.data.task is None:
                own += [
                    f"data.train={folder}/random",
                    f"data.val={folder}/random",
                    "data.build=null",
                ]
            command = [sys.executable, "-c", STARTUP, options.config, *own, *sets]
            environment = {**os.environ, "PYTHONPATH": python_path()}
            done = subprocess.run(command, capture_output=True, text=True, env=environment)
            line = next(
                (line for line in done.stdout.splitlines() if line.startswith("MARKS ")), None
            )
            if line is None:
                raise ValueError(f"--startup: {last_words(done.stderr, done.returncode)}")
            before = 0.0
            for name, at in json.loads(line.removeprefix("MARKS ")):
                phases.setdefault(name, []).append(at - before)
                before = at
    medians = {name: statistics.median(times) for name, times in phases.items()}
    total = sum(seconds for name, seconds in medians.items() if name != "second step")
    lines = [f"    {name:40}{seconds:>7.2f} CPU-s" for name, seconds in medians.items()]
    return "\n".join(
        [*lines, f"    {'command to the end of the first step':40}{total:>7.2f} CPU-s"]
    ), medians
