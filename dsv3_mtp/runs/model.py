"""The model of a run folder: its newest checkpoint, or the weights that it was imported with."""

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from dsv3_mtp.config import Config
from dsv3_mtp.files.fragments import Fragments
from dsv3_mtp.files.run_folder import newest_weights, run_config, start_weights, tokenizer_of
from dsv3_mtp.hf.keys import report, summarise
from dsv3_mtp.hf.load import empty_model, is_finite, load_weights, mismatches
from dsv3_mtp.model.causal_lm import DeepseekV3MTP
from dsv3_mtp.precision.stored import SCALE, StoredMatrices


def _parts(stored: Fragments, name: str, tensor: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The parts of a tensor of the model, and the values of each in a checkpoint: all of it, or of
    a weight that stayed in block-FP8 one matrix after the other.
    """
    if name + SCALE not in stored.shapes:
        yield tensor, stored.read(name)
        return
    matrices = StoredMatrices(stored, name)
    targets = tensor.view(matrices.count, *matrices.shape)
    yield from ((targets[number], matrices[number]) for number in range(matrices.count))


class LoadedModel(NamedTuple):
    """`tokenizer` is the run's tokenizer.json, None where its data has none (Megatron files);
    `notes` say which newer checkpoints could not be used.
    """

    model: DeepseekV3MTP
    config: Config
    tokenizer: Path | None
    notes: list[str]


def load_model(
    folder: str | Path, *, ema: bool = False, trust_code: bool | Collection[str] = False
) -> LoadedModel:
    """A run's model on the CPU, in eval mode and in the dtype of the run.

    The newest complete checkpoint; for an imported run without one, the imported weights as
    training would start. ema: the moving average of the weights instead of the weights.
    trust_code: import what the run's config names as package.module:Class, or which of these names.

    Raises:
        ValueError: no run there, no average in it, neither checkpoint nor imported weights, or
            weights that do not fit the run's config.
    """
    folder = Path(folder)
    if not (folder / "config.yaml").is_file():
        remedy = "name the folder of a run, like runs/v3_tiny"
        raise ValueError(f"{folder}: no config.yaml there; {remedy}")
    config = run_config(folder, trust_code=trust_code)
    stored, notes = newest_weights(folder, ema=ema)
    start = start_weights(config, folder)
    if stored is None and start is None:
        raise ValueError(f"{folder}: no complete checkpoint there; train the run first, or further")
    model = empty_model(config.model, config.mtp, getattr(torch, config.train.dtype))
    if stored is not None:
        state = model.state_dict()
        if problems := summarise(mismatches(stored.shapes, state)):
            where = f"{stored.folder}: its weights do not fit {folder / 'config.yaml'}"
            raise ValueError(report(where, problems))
        for name, tensor in state.items():
            # one at a time: never two models in memory
            for target, values in _parts(stored, name, tensor):
                if not is_finite(values):
                    problems.append(f"{name}: holds nan or infinity")
                target.copy_(values.view_as(target))
        if problems:
            raise ValueError(report(stored.folder, problems))
    elif start is not None:
        model.init_weights(config.run.seed)  # what the import does not have: a fresh MTP module
        load_weights(model, start)
    model.requires_grad_(False).eval()
    return LoadedModel(model, config, tokenizer_of(config, folder), notes)
