"""Everything that knows DeepSpeed, and its only importer: start and stop of processes, the engine
and its JSON.

launch.py     this process among its peers;  build.py its part of the model, and the engine
engine.py     DeepSpeed's JSON, one optimizer step;  pipeline.py the same in stages
experts.py    tokens travel to their experts;  sequence.py slices of rows
placement.py  which ranges of which tensors a rank holds: for checkpoints, and for average.py

Importing this package imports DeepSpeed with its traps on CPU disarmed; the process stays as it
was.
"""

import contextlib
import os
from collections.abc import Iterator, Mapping

import torch


@contextlib.contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """Environment variables for as long as the context lasts."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


# DeepSpeed decides at its import, and warns of its guess where nothing is set.
accelerator = os.environ.get("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
with environment({"DS_ACCELERATOR": accelerator}):
    from dsv3_mtp.parallel import private

if accelerator == "cpu":
    private.without_shm_all_reduce()
