"""A checkpoint in DeepSeek-V3's layout as a run that train, evaluate, generate and export accept.

RUN/config.yaml   the checkpoint's architecture, and `train.init_from: RUN/weights`
RUN/weights/      the same layout, FP8 dequantised, with config.json and tokenizer
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from math import sqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsv3_mtp.config import Config, ConfigError, ModelConfig, MTPConfig, load_config
from dsv3_mtp.config.tree import dump_tree, read_tree
from dsv3_mtp.files.run_folder import IMPORTED
from dsv3_mtp.files.tensorfile import Entry
from dsv3_mtp.hf.beside import check_beside, copy_beside
from dsv3_mtp.hf.export import new_folder
from dsv3_mtp.hf.files import SHARD_BYTES, Checkpoint, write_checkpoint
from dsv3_mtp.hf.keys import Slot, slots
from dsv3_mtp.hf.load import fit, is_finite, open_checkpoint, read_slot, require_same
from dsv3_mtp.hf.settings import (
    STATES,
    TRUNK_HIDDEN,
    TYPES,
    HFSettings,
    to_config_json,
    write_settings,
)
from dsv3_mtp.model.causal_lm import meta_model
from dsv3_mtp.model.size import model_size

# How a stored type is kept: FP8 codes times a power of two are bfloat16 numbers.
KEPT = {
    "F32": torch.float32,
    "F16": torch.float32,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.bfloat16,
}
# Of a run without --config; --set changes it.
SEQ_LEN = 4096  # V3 4.2; shorter for a checkpoint made for less
BATCH, MOST_ROWS = 64, 8  # sequences of a step, and at most of a micro-batch: 8 ranks fit
TOKENS_PER_PARAMETER, FEWEST_STEPS, MOST_TOKENS = 20, 100, 10**9  # of the parameters that learn
LR, LR_WIDTH = 2.2e-4, 7168  # V3 4.2; other widths by the square root, which suits configs/


def import_hf(
    source: str | Path,
    out: str | Path,
    *,
    base: str | Path | None = None,
    sets: Iterable[str] = (),
    data: str | None = None,
    dtype: str | None = None,
    trunk_only: bool = False,
    frozen: bool = False,
    trunk_hidden: str | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> list[str]:
    """Writes the new run folder `out`. Returns what the user should know.

    Args:
        base: YAML of a run whose sections other than `model` are taken over; None: defaults, and
            the checkpoint's D.
        sets: overrides such as "train.freeze=trunk", applied last.
        data: prepared folder for data.train and data.val.
        dtype: bf16 or fp32 for all weights; None: as stored, bf16 for FP8.
        trunk_only: leave the checkpoint's MTP modules out.
        frozen: the run trains MTP modules on a trunk that stays as it is (docs/posthoc.md). No
            weights are copied: `train.init_from` names `source`, which has to stay there.
        trunk_hidden: pre_norm where the MTP module was trained on the trunk's state before its
            final norm (torchtitan); None: what the checkpoint says, post_norm if nothing.

    Raises:
        ValueError: `out` exists; the checkpoint is damaged, incomplete or of another architecture;
            a file beside it is damaged; tensors are not finite; the config has problems. All
            reasons of a kind at once, and nothing is written.
    """
    source, out = Path(source), Path(out)
    checkpoint, settings, stored = open_checkpoint(source, trunk_only=trunk_only)
    require_same(checkpoint)
    if frozen and dtype is not None:
        raise ValueError("--frozen leaves the weights where and as they are; drop --dtype")
    modules = 0 if trunk_only else settings.modules
    if trunk_hidden is not None:
        if frozen or not modules:
            raise ValueError("--trunk-hidden is of MTP modules that are copied; drop it")
        settings = replace(settings, trunk_hidden=trunk_hidden)
    keep = {slot.key: _kept(checkpoint, slot, dtype) for slot in stored if not slot.alias}
    wide = keep["model.embed_tokens.weight"] == torch.float32
    notes = list(settings.notes)
    with new_folder(out) as temporary:
        kept: Any = {"dtype": "float32" if wide else "bfloat16", "frozen": frozen}
        tree = _tree(out, settings, modules, base=base, data=data, **kept)
        if frozen:
            check_beside(source)  # else `copy_beside` does, before anything else is written
            _freeze(tree, source, modules)
        config = _resolve(tree, temporary / "config.yaml", sets)
        notes += fit(settings, modules, config.model, config.mtp, folder=source)[1]
        if frozen:
            return [*notes, *_tokenizer_notes(source, source, config)]
        weights = temporary / IMPORTED
        how = {"modules": modules, "shard_bytes": shard_bytes}
        notes += _write_weights(weights, checkpoint, settings, stored, keep, **how)
    return notes + _tokenizer_notes(source, out / IMPORTED, config)


def _write_weights(
    folder: Path,
    checkpoint: Checkpoint,
    settings: HFSettings,
    stored: list[Slot],
    keep: dict[str, torch.dtype],
    *,
    modules: int,
    shard_bytes: int,
) -> list[str]:
    """Copies tokenizer, trunk and `modules` MTP modules, in types of `keep`. Returns notes."""
    folder.mkdir()
    source = checkpoint.folder
    copy_beside(source, folder)
    reader = _Reader(checkpoint, settings, stored, keep)
    expected = list(slots(settings.model, modules))
    entries = [Entry(slot.name, keep[slot.key], slot.shape) for slot in expected]
    write_checkpoint(folder, entries, reader.tensors(expected), shard_bytes=shard_bytes)
    if reader.problems:
        raise ValueError(
            "\n".join([f"{source}: {len(reader.problems)} problem(s)", *reader.problems])
        )
    content = to_config_json(
        settings.model,
        modules,
        dtype="fp32" if keep["model.embed_tokens.weight"] == torch.float32 else "bf16",
        special_ids=settings.special_ids,
    )
    if settings.trunk_hidden != STATES[0]:
        content[TRUNK_HIDDEN] = settings.trunk_hidden
    write_settings(folder, content)
    open_checkpoint(folder)  # the key contract, on the files as the trainer finds them
    return reader.notes


def _freeze(tree: dict[str, Any], source: Path, modules: int) -> None:
    """Makes a run's config that of post-hoc training; what a base says of the heads stays."""
    tree["train"] |= {"freeze": "trunk", "init_from": str(source.resolve())}
    mtp = dict(tree.get("mtp") or {})
    if mtp.get("mode") == "none":
        mtp = {"mode": "sequential", "num_nextn_predict_layers": max(modules, 1)}
    # lambda 1: there is no main loss to weigh it against (FastMTP)
    tree["mtp"] = {"loss_weight": 1.0} | mtp | {"detach": mtp.get("detach", "all")}


def _tokenizer_notes(source: Path, kept: Path, config: Config) -> list[str]:
    """What to do about the data; `kept`: where the run finds the tokenizer."""
    if not (source / "tokenizer.json").is_file():
        note = f"{source} has no tokenizer.json: only data that is tokenised already can be used"
        if own := next((path.name for path in source.glob("*.model")), None):
            note += f"; or make one of {own} (docs/posthoc.md) and put it there"
        return [note]
    if Path(config.data.train if isinstance(config.data.train, str) else "").exists():
        return []
    data = config.data.train
    return [
        f"{data} is not there: prepare your own text (--input FILES) or Python's library (below)",
        f"next: dsv3 prepare --tokenizer {kept / 'tokenizer.json'} --corpus pystdlib --out {data}",
    ]


def _kept(checkpoint: Checkpoint, slot: Slot, dtype: str | None) -> torch.dtype:
    if slot.is_float32:
        return torch.float32
    return KEPT[checkpoint.places[slot.name].dtype] if dtype is None else TYPES[dtype]


class _Reader:
    """The tensors of a run, one at a time, and what was wrong with them."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        settings: HFSettings,
        stored: list[Slot],
        keep: dict[str, torch.dtype],
    ):
        self.checkpoint, self.block, self.keep = checkpoint, settings.block, keep
        self.own = {slot.key: slot for slot in stored if not slot.alias}
        self.problems: list[str] = []
        self.rounded = 0

    def tensors(self, expected: list[Slot]) -> Iterator[Tensor]:
        for slot in expected:
            own = self.own[slot.key] if slot.alias else slot
            tensor = read_slot(self.checkpoint, own, self.block)
            if not slot.alias and not is_finite(tensor):
                self.problems.append(f"  {slot.name}: holds nan or infinity")
            if slot.alias and slot.name in self.checkpoint.places:
                copy = read_slot(self.checkpoint, slot, self.block)
                if not torch.equal(copy.float(), tensor.float()):
                    self.problems.append(
                        f"  {slot.name}: differs from {own.name}, which this model shares"
                    )
            kept = tensor.to(self.keep[slot.key])
            if self.checkpoint.places[own.name].dtype == "F8_E4M3" and not torch.equal(
                kept.float(), tensor
            ):
                self.rounded += 1
            yield kept

    @property
    def notes(self) -> list[str]:
        if not self.rounded:
            return []
        return [
            (
                f"{self.rounded} FP8 tensors have scales that "
                "bfloat16 rounds; keep them exact with --dtype fp32"
            )
        ]


def _tree(
    out: Path,
    settings: HFSettings,
    modules: int,
    *,
    base: str | Path | None,
    data: str | None,
    dtype: str,
    frozen: bool,
) -> dict[str, Any]:
    """The run's config before overrides."""
    if base is not None:
        tree, problems = read_tree(base)
        if problems:
            raise ConfigError(str(base), problems)
    else:
        mode = "sequential" if modules else "none"
        tree = {
            "mtp": {"mode": mode, "num_nextn_predict_layers": modules},
            "data": {"train": f"data/{out.name}", "val": f"data/{out.name}"},
            "train": {"dtype": dtype},
        }
        _add_sizes(tree, settings.model, modules, frozen)
    tree["model"] = settings.model.model_dump(mode="json")
    for section in ("run", "data", "train"):
        tree[section] = dict(tree.get(section) or {})
    if modules and settings.trunk_hidden != STATES[0]:
        tree["mtp"] = dict(tree.get("mtp") or {}) | {"trunk_hidden": settings.trunk_hidden}
    tree["run"] |= {"name": out.name, "dir": str(out.parent)}
    tree["train"]["init_from"] = str(out / IMPORTED)
    if data is not None:
        tree["data"] |= {"train": data, "val": data}
    return tree


def _add_sizes(tree: dict[str, Any], model: ModelConfig, modules: int, frozen: bool) -> None:
    """Length and size of the steps, by the size of the model: a small one ends in minutes."""
    length = min(SEQ_LEN, model.max_position_embeddings)
    mtp = MTPConfig(num_nextn_predict_layers=modules or 1)
    size = model_size(meta_model(model, mtp), length)
    learns = size.mtp_total if frozen else size.total + (size.mtp_total if modules else 0)
    tokens = min(TOKENS_PER_PARAMETER * learns, MOST_TOKENS)
    rows = max(1, min(MOST_ROWS, SEQ_LEN // length))
    tree["data"]["seq_len"] = length
    tree["train"] |= {
        "total_tokens": max(tokens, FEWEST_STEPS * BATCH * length),
        "batch_size": BATCH,
        "micro_batch_size": 1 << rows.bit_length() - 1,
    }
    if frozen:  # what was trained goes on at V3's own, which is low for a small model
        tree["optim"] = {"lr": float(f"{LR * sqrt(LR_WIDTH / model.hidden_size):.1e}")}


def _resolve(tree: dict[str, Any], path: Path, sets: Iterable[str]) -> Config:
    """Checks the config and writes it with every default filled in."""
    path.write_text(dump_tree(tree), encoding="utf-8")
    try:
        config = load_config(path, sets)
    except ConfigError as error:
        raise ConfigError("the imported run's config", error.problems) from None
    path.write_text(config.to_yaml(), encoding="utf-8")
    return config
