"""Time and peak memory of export and import on a checkpoint made up for that: python -m
tests.hf.measure DIR [LAYERS].

Every tool runs in its own process. `peak` is the highest resident memory above what the imports
take; `anonymous` is the part of it that is not pages of mapped files.
"""

import argparse
import multiprocessing
import os
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path

STEPS = {
    "export bf16": "export_hf('run', 'bf16', dtype='bf16')",
    "export fp8": "export_hf('run', 'fp8', dtype='fp8')",
    "import bf16": "import_hf('bf16', 'from_bf16')",
    "import fp8": "import_hf('fp8', 'from_fp8')",
    "load bf16": "load_hf('bf16')",
    "load fp8": "load_hf('fp8')",
}


def measure(
    folder: Path,
    *,
    layers: int,
    hidden: int = 1024,
    experts: int = 32,
    dtypes: tuple[str, ...] = ("bf16", "fp8"),
) -> dict[str, dict[str, float]]:
    """Seconds of CPU and megabytes of every step; the size of the model in bfloat16 under
    "model".
    """
    work(folder, f"make({layers}, {hidden}, {experts})")
    masters = (
        sum(path.stat().st_size for path in folder.glob("run/checkpoints/*/*.safetensors")) / 2**20
    )
    return {"model": {"MiB": masters / 2}} | {
        name: work(folder, code) for name, code in STEPS.items() if name.endswith(dtypes)
    }


def work(folder: Path, code: str) -> dict[str, float]:
    """In a process of its own: its peak starts at what it shares with this one."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=call, args=(folder, code, sender))
    process.start()
    process.join()
    if process.exitcode != 0:
        raise RuntimeError(f"{code}: exit code {process.exitcode}")
    return receiver.recv()


def make(layers: int, hidden: int, experts: int) -> None:
    """A bfloat16 run with one MTP module."""
    import torch

    from dsv3_mtp.hf.load import empty_model
    from tests.conftest import tiny
    from tests.made_runs import randomise, write_run

    model = {"num_hidden_layers": layers, "hidden_size": hidden, "n_routed_experts": experts}
    model |= {
        "moe_intermediate_size": hidden // 2,
        "intermediate_size": 4 * hidden,
        "vocab_size": 16 * hidden,
    }
    config = tiny(
        {f"model.{key}": value for key, value in model.items()} | {"train.dtype": "bfloat16"}
    )
    write_run(Path("run"), config, randomise(empty_model(config.model, config.mtp, torch.bfloat16)))


def call(folder: Path, code: str, sender: Connection) -> None:
    from dsv3_mtp.hf import export_hf, import_hf, load_hf

    folder.mkdir(exist_ok=True)
    os.chdir(folder)
    names = {"export_hf": export_hf, "import_hf": import_hf, "load_hf": load_hf, "make": make}
    before, anonymous = status("VmRSS"), [status("RssAnon")]
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.01):
            anonymous.append(status("RssAnon"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    wall, cpu = time.perf_counter(), time.process_time()
    result = eval(code, names)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    done.set()
    watcher.join()
    del result
    # not getrusage: its maximum is inherited from the process that started this one
    peak = status("VmHWM") - before
    sender.send(
        {"s": wall, "cpu_s": cpu, "peak_MiB": peak, "anonymous_MiB": max(anonymous) - anonymous[0]}
    )


def status(key: str) -> float:
    """A line of /proc/self/status in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(key))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("layers", type=int, nargs="?", default=12)
    options = parser.parse_args()
    for name, values in measure(options.folder, layers=options.layers).items():
        print(
            f"{name:12}",
            "  ".join(f"{key} {value:9.1f}" for key, value in values.items()),
            flush=True,
        )
