"""The training of one run of a study: in the worker's own process, or in several under torchrun.

`python -m dsv3_mtp.study.training CONFIG COMMAND` is one of these several processes. A launcher per
run keeps their process groups apart, and gives each run ports of its own.
"""

import json
import os
import signal
import subprocess
import sys
import time
from typing import Any

import torch
from pydantic import with_config
from typing_extensions import TypedDict

from dsv3_mtp.config import Config, load_config
from dsv3_mtp.files.atomic import write_json, write_text
from dsv3_mtp.files.checked import OPEN, read_json
from dsv3_mtp.runs.folder import run_folder
from dsv3_mtp.train.process import SHUTDOWN, own_process
from dsv3_mtp.train.record import NonFiniteError

CONFIG, TRAINED = ".ranks.yaml", ".ranks.json"  # in a run folder: what the ranks get, and give back
SAVING_S = "600"  # what torchrun leaves to ranks that save, before it kills them
LOOPBACK = "127.0.0.1"


@with_config(OPEN)
class Trained(TypedDict):
    """What one start of a run has come to."""

    seconds: float
    """Its cost, summed over the ranks: of computing on a CPU, which other processes do not lengthen
    much; else elapsed."""
    tokens: int
    """That it has trained on."""
    pace: float
    """Seconds per token of all starts, elapsed, times ranks."""
    finished: bool
    error: str | None
    """Why it diverged."""


def train(config: Config, command: list[str]) -> Trained:
    """Trains in this process, which may be one of several."""
    trainer = own_process(config, command=command)
    begun, first = _seconds(trainer), trainer.tokens
    try:
        trainer.run()
    except NonFiniteError as problem:
        return Trained(seconds=0.0, tokens=0, pace=0.0, finished=False, error=str(problem))
    ranks, spent = trainer.world.size, _seconds(trainer) - begun
    if ranks > 1:
        total = torch.tensor(spent, dtype=torch.float64, device=trainer.world.device)
        torch.distributed.all_reduce(total)
        spent = float(total)
    return Trained(
        seconds=spent,
        tokens=trainer.tokens - first,
        pace=ranks * trainer.clock.seconds / trainer.tokens,
        finished=trainer.progress >= 1,
        error=None,
    )


def train_on_ranks(config: Config, command: list[str], *, ranks: int, held: int) -> Trained:
    """Trains in `ranks` processes of this host. SIGTERM is passed on to them: they save and stop.

    held: descriptor of the run's lock. The launcher keeps it open: a run whose worker was killed is
        claimed until its ranks have ended too.

    Raises:
        RuntimeError: they failed; the run's log says why.
    """
    folder = run_folder(config)
    write_text(folder / CONFIG, config.to_yaml())
    (folder / TRAINED).unlink(missing_ok=True)
    torchrun = ["torch.distributed.run", "--nproc-per-node", str(ranks)]
    torchrun += ["--local-addr", LOOPBACK, "--rdzv-endpoint", f"{LOOPBACK}:0"]
    torchrun += ["--rdzv-backend", "c10d", "-m", "dsv3_mtp.study.training"]
    launcher = subprocess.Popen(
        [sys.executable, "-m", *torchrun, str(folder / CONFIG), json.dumps(command)],
        env={SHUTDOWN: SAVING_S} | os.environ,
        pass_fds=(held,),
        start_new_session=True,  # Ctrl-C comes once, through this process
    )
    before = signal.signal(signal.SIGTERM, lambda *_: launcher.terminate())
    ignored = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        code = launcher.wait()
    finally:
        signal.signal(signal.SIGTERM, before)
        signal.signal(signal.SIGINT, ignored)
    if not (folder / TRAINED).exists():
        raise RuntimeError(f"the {ranks} processes of the run failed, torchrun's exit code {code}")
    return read_json(folder / TRAINED, Trained, "delete it and start the study again")


def _seconds(trainer: Any) -> float:
    return time.process_time() if trainer.world.device.type == "cpu" else trainer.clock.seconds


def main(path: str, command: str) -> None:
    config = load_config(path)
    trained = train(config, json.loads(command))
    if torch.distributed.get_rank() == 0:
        write_json(run_folder(config) / TRAINED, trained)
    from dsv3_mtp.parallel.launch import finish

    finish()


if __name__ == "__main__":
    main(*sys.argv[1:])
