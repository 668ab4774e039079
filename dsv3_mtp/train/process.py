"""What a program does to its own process to train in it.

The command line and the workers of a study call this; `Trainer(...)` in a notebook changes nothing
that outlives it: no signal handler, allocator, matmul precision or warnings filter.
"""

import warnings

from dsv3_mtp.config import Config
from dsv3_mtp.ops.tuning import tune
from dsv3_mtp.parallel.launch import StopRequest, local_device
from dsv3_mtp.train.trainer import Trainer


def own_process(config: Config, *, command: list[str]) -> Trainer:
    """A Trainer in a process that is there for it alone: SIGTERM and SIGINT save and stop the run,
    and what makes training faster on this device is turned on.

    Raises:
        ValueError: as Trainer.
    """
    # DeepSpeed's calls, not ours
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed.*")
    stop = StopRequest()
    return Trainer(config, command=command, stop=stop, notes=tune(local_device()))
