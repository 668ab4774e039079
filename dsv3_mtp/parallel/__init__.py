"""Everything that knows DeepSpeed, and its only importer: start and stop of processes, the engine and its JSON.

Importing this package imports DeepSpeed with its traps on CPU disarmed.
"""

import os
import warnings

import torch

os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")  # else it warns of its guess
warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed.*")  # DeepSpeed's calls, not ours

import deepspeed.ops  # noqa: E402

if os.environ["DS_ACCELERATOR"] == "cpu":
    # An inference-only all-reduce: every CPU start would compile it for 45 s, or hang on it after a killed build.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
