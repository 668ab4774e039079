"""Runs made by hand for tests: no training, only the files that the tools read."""

import json
from pathlib import Path

import torch

from dsv3_mtp.loading import WEIGHTS
from dsv3_mtp.model.causal_lm import DeepseekV3MTP


def randomise(model: DeepseekV3MTP, seed: int = 0) -> DeepseekV3MTP:
    """Weights, norms and router biases that all differ from their initial values."""
    generator = torch.Generator().manual_seed(seed)
    model.init_weights(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5, generator=generator)
        for gate in model.gates():
            gate.e_score_correction_bias.uniform_(0.0, 0.2, generator=generator)
    return model


def write_run(folder: Path, config, model: DeepseekV3MTP, *, step: int = 7) -> Path:
    """A run folder with one complete checkpoint, as the trainer leaves it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(config.to_yaml())
    write_checkpoint(folder, model, step=step, tokens=config.train.total_tokens // 2)
    return folder


def write_checkpoint(folder: Path, model: DeepseekV3MTP, *, step: int, tokens: int = 2048) -> None:
    checkpoint = folder / "checkpoints" / f"global_step{step}"
    checkpoint.mkdir(parents=True)
    torch.save({"module": model.state_dict()}, checkpoint / WEIGHTS)
    (checkpoint / "state.json").write_text(json.dumps({"step": step, "tokens": tokens}))
    sizes = {path.name: path.stat().st_size for path in checkpoint.iterdir()}
    (checkpoint / "COMPLETE.json").write_text(json.dumps({"files": sizes}))


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, by relative path."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
