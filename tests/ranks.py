"""Real processes for tests, ranks and tools: forked from this one, which has imported torch and
DeepSpeed already.
"""

import faulthandler
import gc
import importlib
import multiprocessing
import os
import runpy
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Container, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dsv3_mtp.report.plots
import dsv3_mtp.train.process  # for the forked processes: each would otherwise load it for seconds
from dsv3_mtp.data.megatron import write_index
from dsv3_mtp.parallel.engine import import_muon
from dsv3_mtp.report.metrics import read_metrics

# This too, and what DeepSpeed imports late, of Mixture-of-Experts layers that it could put in.
import_muon()
importlib.import_module("deepspeed.module_inject.auto_ep_layer")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_ranks(
    function: Callable[..., Any], *args: Any, world_size: int = 1, log: Path, timeout: float = 120
) -> list[int]:
    """Calls function(*args) in `world_size` processes that form one process group; returns their
    exit codes.

    Output and tracebacks go to log.rank{r}. As a launcher does, the first failure ends the others
    (exit code -9).
    """
    port, context = free_port(), multiprocessing.get_context("fork")
    ranks = [
        context.Process(
            target=_child,
            args=(function, args, rank, world_size, port, f"{log}.rank{rank}", timeout),
        )
        for rank in range(world_size)
    ]
    for process in ranks:
        process.start()
    deadline = time.monotonic() + timeout
    while any(process.exitcode is None for process in ranks):
        failed = any(process.exitcode not in (None, 0) for process in ranks)
        if failed or time.monotonic() > deadline:
            time.sleep(0.5 if failed else 0)
            for process in ranks:
                process.kill()
        time.sleep(0.05)
    return [process.exitcode for process in ranks]  # type: ignore[misc]


def chosen(request: pytest.FixtureRequest, *parameters: str) -> list[Any]:
    """The values of these parameters in the tests of this file that this session runs: a fixture
    that trains whole tables leaves out the rows that nobody asks for.
    """
    calls = [
        item.callspec.params
        for item in request.session.items
        if item.path == request.path and isinstance(item, pytest.Function)
        if hasattr(item, "callspec")
    ]
    rows = [[call[name] for name in parameters] for call in calls if {*parameters} <= {*call}]
    values = [row[0] if len(row) == 1 else tuple(row) for row in rows]
    return list(dict.fromkeys(values))


def rows(names: Iterable[Any], quick: Container[Any]) -> list[Any]:
    """Parameters of a table: what is not among the quick ones is slow."""
    return [n if n in quick else pytest.param(n, marks=pytest.mark.slow) for n in names]


def touch(metrics: Any, out: Path, *, config: Any) -> None:
    """Instead of the curves, which take longer than many a run here."""
    out.touch()


def _child(
    function: Callable[..., Any],
    args: tuple,
    rank: int,
    world_size: int,
    port: int,
    log: str,
    timeout: float = 120,
) -> None:
    # DeepSpeed collects garbage many times; all that was there before the fork would be copied each
    # time
    gc.freeze()
    dsv3_mtp.report.plots.plot_run = touch
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    # what hangs is killed: the log says where
    faulthandler.dump_traceback_later(timeout - 5, file=2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    signal.signal(signal.SIGINT, signal.default_int_handler)
    code = 0
    try:
        function(*args)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def run_tool(
    tool: Path, *arguments: str, log: Path, world_size: int = 1, cwd: Path | None = None
) -> tuple[int, str]:
    """`python tool arguments` in its own processes, without the seconds of its imports: exit code
    and output of rank 0.

    One process starts without a launcher's environment, as a user's would.
    """
    codes = run_ranks(
        _main,
        tool,
        arguments,
        cwd or Path.cwd(),
        world_size,
        world_size=world_size,
        log=log,
        timeout=200,
    )
    return codes[0], Path(f"{log}.rank0").read_text()


def train_to_end(config: Any) -> None:
    dsv3_mtp.train.process.own_process(config, command=["test"]).run()


def train_until(config: Any, step: int) -> None:
    """Gets SIGTERM while it works on `step`, as from a scheduler."""
    trainer = dsv3_mtp.train.process.own_process(config, command=["test"])
    original = trainer.sampler.next_batch

    def next_batch(*args, **kwargs):
        if trainer.step + 1 == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args, **kwargs)

    trainer.sampler.next_batch = next_batch  # type: ignore[method-assign]
    trainer.run()


def folder_of(config: Any) -> Path:
    return Path(config.run.dir) / config.run.name


def trained(
    config: Any,
    function: Callable[..., Any] = train_to_end,
    *args: Any,
    world_size: int = 1,
    expect: int | None = 0,
) -> list[dict]:
    """Calls function(config, *args) on ranks, whose exit codes have to be `expect` (None: any);
    returns the metrics. Output goes to NAME.log.rank{r} beside the folder of runs.
    """
    log = Path(config.run.dir).parent / f"{config.run.name}.log"
    codes = run_ranks(function, config, *args, world_size=world_size, log=log)
    text = "".join(path.read_text() for path in sorted(log.parent.glob(f"{log.name}.rank*")))
    assert expect is None or codes == [expect] * world_size, f"exit codes {codes}\n{text}"
    metrics = folder_of(config) / "metrics.jsonl"
    return read_metrics(metrics) if metrics.exists() else []


def timeless(records: list[dict]) -> list[dict]:
    """Records of metrics.jsonl without what differs between two runs of the same numbers."""
    return [
        {k: v for k, v in r.items() if k != "time_s" and not k.startswith("perf/")} for r in records
    ]


def _main(tool: Path, arguments: tuple[str, ...], cwd: Path, world_size: int) -> None:
    if world_size == 1:
        for name in (
            "RANK",
            "LOCAL_RANK",
            "WORLD_SIZE",
            "LOCAL_WORLD_SIZE",
            "MASTER_ADDR",
            "MASTER_PORT",
        ):
            os.environ.pop(name)
    os.chdir(cwd)
    sys.argv = [str(tool), *arguments]
    sys.path.insert(0, str(tool.parent))
    runpy.run_path(str(tool), run_name="__main__")


def markov_chain(states: int = 32, *, seed: int = 0, sharpness: float = 2.0) -> np.ndarray:
    """(states, states) transition probabilities of a random order-1 chain."""
    logits = sharpness * np.random.default_rng(seed).standard_normal((states, states))
    weights = np.exp(logits)
    return weights / weights.sum(1, keepdims=True)


def markov_tokens(chain: np.ndarray, length: int, *, seed: int) -> np.ndarray:
    """A walk of `length` tokens through the chain."""
    draws = np.random.default_rng(seed).random(length)
    cumulative, walk = chain.cumsum(1), np.empty(length, np.uint16)
    state = 0
    for i in range(length):
        state = min(int(np.searchsorted(cumulative[state], draws[i])), len(chain) - 1)
        walk[i] = state
    return walk


def write_markov(
    prefix: Path, *, tokens: int, documents: int, states: int = 64, seed: int = 1
) -> str:
    """A Megatron pair PREFIX.bin/.idx with a Markov walk cut into documents of random lengths."""
    prefix.parent.mkdir(parents=True, exist_ok=True)
    walk = markov_tokens(markov_chain(states), tokens, seed=seed)
    cuts = np.sort(
        np.random.default_rng(seed).choice(np.arange(1, tokens), documents - 1, replace=False)
    )
    walk.tofile(f"{prefix}.bin")
    write_index(Path(f"{prefix}.idx"), walk.dtype, np.diff([0, *cuts, tokens]))
    return str(prefix)
