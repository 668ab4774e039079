"""A run folder as training leaves it, made in a moment."""

from pathlib import Path
from typing import Any

import torch

from dsv3_mtp.data.tokenizer import train_tokenizer
from dsv3_mtp.model.causal_lm import DeepseekV3MTP
from tests.made_runs import write_checkpoint


def write_run(config: Any, root: Path) -> tuple[Path, DeepseekV3MTP]:
    """root/runs/tiny with random weights and root/data/tiny/tokenizer.json of 260 tokens; the folder and the model."""
    folder, data = root / "runs/tiny", root / "data/tiny"
    for path in (folder, data):
        path.mkdir(parents=True)
    (folder / "config.yaml").write_text(config.to_yaml())
    (data / "tokenizer.json").write_text(train_tokenizer(["plain text"], 260))
    model = DeepseekV3MTP(config.model, config.mtp)
    model.init_weights(0)
    for parameter in model.parameters():  # router biases stay float32
        parameter.data = parameter.data.to(getattr(torch, config.train.dtype))
    write_checkpoint(folder, model, step=4)
    return folder, model
