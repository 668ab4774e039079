"""Everything that knows DeepSpeed, and its only importer: start and stop of processes, the engine
and its JSON.

launch.py     this process among its peers;  build.py its part of the model, and the engine
engine.py     DeepSpeed's JSON, one optimizer step;  pipeline.py the same in stages
experts.py    tokens travel to their experts;  sequence.py slices of rows
placement.py  which ranges of which tensors a rank holds: for checkpoints, and for average.py

Importing this package imports DeepSpeed with its traps on CPU disarmed.
"""

import os
import warnings

import torch

# else it warns of its guess
os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
# DeepSpeed's calls, not ours
warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed.*")

import deepspeed.ops  # noqa: E402

if os.environ["DS_ACCELERATOR"] == "cpu":
    # An inference-only all-reduce: every CPU start would compile it for 45 s, or hang on it after a
    # killed build.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
