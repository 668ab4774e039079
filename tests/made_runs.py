"""Runs made by hand for tests: no training, only the files that the tools read."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsv3_mtp.data.tokenizer import train_tokenizer
from dsv3_mtp.files.digest import file_digest
from dsv3_mtp.files.fragments import INDEX, Fragment, Fragments, merge_index, write_fragments
from dsv3_mtp.files.run_folder import COMPLETE, newest_checkpoint
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


def write_text_run(config: Any, root: Path) -> tuple[Path, DeepseekV3MTP]:
    """root/runs/tiny with random weights and root/data/tiny/tokenizer.json of 260 tokens; the
    folder and the model.
    """
    data = root / "data/tiny"
    data.mkdir(parents=True)
    (data / "tokenizer.json").write_text(train_tokenizer(["plain text"], 260))
    model = DeepseekV3MTP(config.model, config.mtp)
    model.init_weights(0)
    for parameter in model.parameters():  # router biases stay float32
        parameter.data = parameter.data.to(getattr(torch, config.train.dtype))
    return write_run(root / "runs/tiny", config, model, step=4), model


def write_checkpoint(
    folder: Path, model: DeepseekV3MTP, *, step: int, tokens: int = 2048, ranks: int = 1
) -> None:
    checkpoint = folder / "checkpoints" / f"global_step{step}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text(json.dumps({"step": step, "tokens": tokens}))
    write_state(checkpoint, model.state_dict(), ranks=ranks)


def write_state(checkpoint: Path, state: dict[str, torch.Tensor], *, ranks: int = 1) -> None:
    """Float32 masters and router biases, a range of each tensor per rank; and the file that
    completes the folder.
    """
    parts = []
    for rank in range(ranks):
        fragments = []
        for name, tensor in state.items():
            start, stop = (tensor.numel() * r // ranks for r in (rank, rank + 1))
            fragments.append(
                Fragment(
                    name, tuple(tensor.shape), start, tensor.float().flatten()[start:stop], {}, {}
                )
            )
        parts.append(write_fragments(checkpoint, rank, fragments)[0])
    (checkpoint / INDEX).write_text(json.dumps(merge_index(parts)))
    complete(checkpoint)


def complete(checkpoint: Path) -> None:
    """The file that completes a checkpoint, for its files as they are now."""
    files = [path for path in sorted(checkpoint.iterdir()) if path.name != COMPLETE]
    sizes = {path.name: path.stat().st_size for path in files}
    digests = {path.name: file_digest(path) for path in files}
    (checkpoint / COMPLETE).write_text(json.dumps({"files": sizes, "digests": digests}))


def read_newest(run: Path) -> dict[str, Tensor]:
    """`read_state_dict` of a run's newest checkpoint."""
    newest = newest_checkpoint(run / "checkpoints")
    assert newest is not None
    return read_state_dict(newest)


def read_state_dict(checkpoint: Path) -> dict[str, Tensor]:
    """Weights and router biases, whole, whatever the layout of the run that wrote them. All of it
    is read.

    What was trained comes as its float32 master, also of a bfloat16 run: cast, it is the weight
        that training used.

    Raises:
        ValueError: the checkpoint is damaged or of another format.
    """
    stored = Fragments(checkpoint)
    return {name: stored.read(name).view(shape) for name, shape in stored.shapes.items()}
