"""What a program does to its own process to train in it.

The command line and the workers of a study call this; `Trainer(...)` in a notebook changes nothing
that outlives it: no signal handler, allocator, matmul precision or warnings filter.
"""

import os
import warnings

from dsv3_mtp.config import Config
from dsv3_mtp.ops.choice import missing
from dsv3_mtp.ops.tuning import tune
from dsv3_mtp.parallel.launch import StopRequest, local_device
from dsv3_mtp.train.trainer import Trainer

SHUTDOWN = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"  # seconds; read by torchrun


def own_process(config: Config, *, command: list[str], profile: range = range(0)) -> Trainer:
    """A Trainer in a process that is there for it alone: SIGTERM and SIGINT save and stop the run,
    and what makes training faster on this device is turned on.

    Raises:
        ValueError: as Trainer.
    """
    # DeepSpeed's calls, not ours
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed.*")
    # Rows per expert change with every micro-batch: blocks of fixed size would leave gaps. Read
    # when CUDA starts.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    stop = StopRequest()
    device = local_device()
    tune(device)
    slower = missing(device)  # a user hears of kernels where they are not what they could be
    notes = [*([slower] if slower else []), *torchrun_notes()]
    return Trainer(config, command=command, stop=stop, notes=notes, profile=profile)


def torchrun_notes() -> list[str]:
    """What to know of torchrun, if that started this process: it kills its ranks a while after it
    has passed SIGTERM on, and a step that takes longer than that is not saved.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ or SHUTDOWN in os.environ:
        return []
    return [
        f"torchrun kills its ranks 30 s after SIGTERM: where a step takes longer, set {SHUTDOWN}"
    ]
