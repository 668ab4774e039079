"""Start and stop of one training process under `deepspeed`, `torchrun` or plain `python`."""

import atexit
import contextlib
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import deepspeed
import psutil
import torch
import torch.distributed
from deepspeed.accelerator import get_accelerator

from dsv3_mtp.config.launcher import check_ranks
from dsv3_mtp.parallel import environment, private

LOOPBACK = "127.0.0.1"
LOCAL = ("localhost", LOOPBACK, "::1")


@dataclass(frozen=True)
class World:
    """This process among its peers. Ranks are ordered by pipeline stage: stage 0 has the first
    `replicas` of them.

    Within a stage `slices` ranks that follow each other share the rows of a batch.
    """

    rank: int
    size: int
    local_rank: int
    device: torch.device
    stages: int = 1
    slices: int = 1

    @property
    def replicas(self) -> int:
        """Ranks of a pipeline stage: those over which DeepSpeed averages gradients."""
        return max(self.size // self.stages, 1)

    @property
    def data_size(self) -> int:
        """Groups of ranks that work on different sequences."""
        return self.replicas // self.slices

    @property
    def data_rank(self) -> int:
        return self.rank % self.replicas // self.slices

    @property
    def stage(self) -> int:
        return self.rank // self.replicas

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def start(*, threads: int | None, timeout_s: float, stages: int = 1, slices: int = 1) -> World:
    """Joins the process group: nccl on CUDA, gloo on CPU. To be called inside `starting`.

    Args:
        threads: CPU threads of this process; None shares the cores this process may use among the
            ranks of the host.
        timeout_s: after this long a collective whose peer hangs raises instead of waiting for ever.
        stages: of the pipeline.
        slices: of each row, on as many ranks.
    """
    # deepspeed's, torchrun's
    local_size = int(os.environ.get("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", "1")))
    device = local_device()
    if device.type == "cpu" or threads is not None:
        torch.set_num_threads(threads or max(1, len(os.sched_getaffinity(0)) // local_size))
    timeout = timedelta(seconds=timeout_s)
    _join("nccl" if device.type == "cuda" else "gloo", timeout)
    with contextlib.redirect_stdout(None):
        deepspeed.init_distributed(verbose=False, timeout=timeout, auto_mpi_discovery=False)
    rank, size, local_rank = (
        int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    )
    return World(rank, size, local_rank, device, stages, slices)


@contextlib.contextmanager
def starting(timeout_s: float) -> Iterator[None]:
    """Around the start of a run. Without a launcher the environment is that of a world of one; it
    and torch's default timeout are as before afterwards.

    DeepSpeed's sub-groups take that default whatever timeout is passed to it.

    Raises:
        ValueError: the environment describes half of a world.
    """
    check_ranks()
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": LOOPBACK}
    alone["MASTER_PORT"] = "0"  # DeepSpeed wants one named; nothing listens
    own = {} if "RANK" in os.environ else alone
    local = (own or os.environ).get("MASTER_ADDR") in LOCAL
    if local and "GLOO_SOCKET_IFNAME" not in os.environ and (name := _loopback_interface()):
        own = own | {"GLOO_SOCKET_IFNAME": name}
    with environment(own), private.default_timeout(timeout_s):
        yield


def local_device() -> torch.device:
    """The device of this process, from now on torch's own: a GPU by LOCAL_RANK, or the CPU."""
    if get_accelerator().device_name() != "cuda":  # as DS_ACCELERATOR says, if it is set
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


def _join(backend: str, timeout: timedelta) -> None:
    """Joins torch's process group so that, where all ranks are on this host, no other host can
    connect.

    A world of one meets in its own memory. Ranks whose MASTER_ADDR is the loopback address meet
    there; torchrun's agent keeps their store, on the addresses that it chooses. gloo listens on one
    port per group, on the loopback interface then, unless GLOO_SOCKET_IFNAME names another.
    """
    if torch.distributed.is_initialized():
        return
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    local = host in LOCAL
    store: torch.distributed.Store | None = None
    if local and size == 1 and "TORCHELASTIC_RUN_ID" not in os.environ:
        store = torch.distributed.HashStore()
    elif local and "TORCHELASTIC_RUN_ID" not in os.environ:
        listening = socket.create_server((LOOPBACK, port)).detach() if rank == 0 else None
        store = torch.distributed.TCPStore(
            LOOPBACK, port, size, rank == 0, timeout, master_listen_fd=listening
        )
    where = {} if store is None else {"store": store, "rank": rank, "world_size": size}
    torch.distributed.init_process_group(backend, timeout=timeout, **where)  # type: ignore[arg-type]


def _loopback_interface() -> str | None:
    addresses = psutil.net_if_addrs().items()
    return next((name for name, own in addresses if any(a.address == LOOPBACK for a in own)), None)


def on_main(world: World, function: Callable[[], Any]) -> Any:
    """Calls `function` on rank 0 while the others wait; returns its result everywhere, or raises
    everywhere.

    Raises:
        ValueError: with the message of the ValueError or OSError that rank 0 met.
    """
    outcome = [on_all(world, function if world.is_main else lambda: None)]
    torch.distributed.broadcast_object_list(outcome)
    return outcome[0]


def on_all(world: World, function: Callable[[], Any]) -> Any:
    """Calls `function`, which waits for no other rank, on every rank; returns its result, or raises
    everywhere.

    Raises:
        ValueError: with the message of the first rank that met a ValueError or OSError.
    """
    result, problem = None, None
    try:
        result = function()
    except (ValueError, OSError) as error:
        problem = str(error)
    problems: list[str | None] = [None] * world.size
    torch.distributed.all_gather_object(problems, problem)
    if met := [text for text in problems if text is not None]:
        raise ValueError(met[0])
    return result


def finish() -> None:
    """Ends the process after success: gloo's threads abort some normal interpreter exits."""
    torch.distributed.barrier()
    gloo = torch.distributed.get_backend() == "gloo"
    if not gloo:
        torch.distributed.destroy_process_group()
        return
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


class StopRequest:
    """True once this process should save and stop: SIGTERM, SIGINT, or its launcher is gone.

    Killing `deepspeed` leaves its launch.py and the ranks running as orphans, `kill -9` of torchrun
    its ranks; a rank therefore watches its ancestors. A second SIGINT interrupts at once.
    """

    def __init__(self) -> None:
        self.reason = ""
        self._ancestors = self._find_ancestors()
        signal.signal(signal.SIGTERM, self._on_signal)
        signal.signal(signal.SIGINT, self._on_signal)

    def __bool__(self) -> bool:
        if not self.reason and self._ancestors and self._find_ancestors() != self._ancestors:
            self.reason = "the end of its launcher"
        return bool(self.reason)

    def _on_signal(self, signum: int, _frame) -> None:
        if signum == signal.SIGINT and self.reason == "SIGINT":
            raise KeyboardInterrupt
        self.reason = signal.Signals(signum).name

    @staticmethod
    def _find_ancestors() -> tuple[int, int] | None:
        """(pid of deepspeed's launch.py, pid of its parent), or (pid of torchrun, 0), if that
        started this process.
        """
        with contextlib.suppress(psutil.Error):
            launcher = psutil.Process(os.getppid())
            if "deepspeed.launcher.launch" in launcher.cmdline():
                return launcher.pid, launcher.ppid()
            if "TORCHELASTIC_RUN_ID" in os.environ:
                return launcher.pid, 0  # its own parent may well end before it
        return None
