"""A run's weights as a folder that transformers, vLLM and SGLang read."""

import os
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsv3_mtp.config import AdaptiveSchedule, Config, schedules
from dsv3_mtp.data.tokenizer import recorded_encoder
from dsv3_mtp.files.atomic import folder_for, lock, sync, sync_tree, write_json
from dsv3_mtp.files.checked import read_json
from dsv3_mtp.files.run_folder import (
    IMPORTED,
    newest_weights,
    read_reached,
    run_config,
    tokenizer_of,
)
from dsv3_mtp.files.tensorfile import Entry
from dsv3_mtp.hf.beside import copy_beside
from dsv3_mtp.hf.card import Made, write_card
from dsv3_mtp.hf.files import SHARD_BYTES, write_checkpoint
from dsv3_mtp.hf.keys import Slot, report, slots, summarise
from dsv3_mtp.hf.load import is_finite, mismatches, open_checkpoint, read_slot
from dsv3_mtp.hf.readers import findings
from dsv3_mtp.hf.settings import TYPES, read_settings, representable, to_config_json, write_settings
from dsv3_mtp.hf.special import SPECIAL_IDS
from dsv3_mtp.hf.splice import TrunkFiles, splice
from dsv3_mtp.model.causal_lm import meta_model
from dsv3_mtp.precision.quantise import BLOCK, quantise, scale_shape
from dsv3_mtp.precision.stored import SCALE, StoredMatrices

Read = Callable[[Slot], Tensor]


def export_hf(
    run: str | Path,
    out: str | Path,
    *,
    dtype: str | None = None,
    trunk_only: bool = False,
    ema: bool = False,
    trust_code: bool | Collection[str] = False,
    reader: str | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> list[str]:
    """Writes the newest checkpoint of a run to the new folder `out`. Returns what the user should
    know.

    Args:
        dtype: bf16; fp8 (E4M3 in 128 x 128 blocks, see `keys.QUANTISED`, the rest bf16); fp32.
            None: bf16, except that modules on a frozen trunk are put beside the files it came
            from, which are copied as they are (hf/splice.py).
        trunk_only: leave MTP modules out.
        ema: the moving average of the weights instead of the weights.
        trust_code: import what the run's config names as package.module:Class.
        reader: a key of READERS that is to load it; None: any.

    Raises:
        ValueError: `out` exists, there is no checkpoint or no average in it, the layout cannot
            represent the run, `reader` would not load it, tensors are missing, unused, of a wrong
            shape or not finite; all reasons of a kind at once, and nothing is written.
    """
    run, out = Path(run), Path(out)
    config = run_config(run, trust_code=trust_code)
    modules, notes = representable(config.model, config.mtp, trunk_only=trunk_only)
    if dtype is None and config.train.freeze == "trunk" and modules and not ema:
        return _beside_trunk(run, out, config, modules, notes, reader)
    dtype = dtype or "bf16"
    expected = list(slots(config.model, modules))
    notes += _readers(config, expected, modules, dtype, reader)
    read, origin, more = _open_run(run, config, expected, modules, ema)
    if dtype != "bf16" and config.train.dtype == "bfloat16" and origin != run / IMPORTED:
        more.append(f"{dtype}: of the float32 masters; training rounded them to bfloat16")
    what = "average of the weights" if ema else "weights"
    notes = [f"{what} from {origin}", *dict.fromkeys([*notes, *more])]
    bad: list[str] = []
    with new_folder(out) as temporary:
        ids, found = _copy_tokenizer(run, config, temporary)
        notes += found
        entries = [entry for slot in expected for entry in entries_of(slot, dtype)]
        write_checkpoint(
            temporary, entries, _converted(expected, read, dtype, bad), shard_bytes=shard_bytes
        )
        write_settings(
            temporary, to_config_json(config.model, modules, dtype=dtype, special_ids=ids)
        )
        if bad:
            raise ValueError(
                "\n".join([f"{origin}: {len(bad)} tensor(s) hold nan or infinity:", *bad])
            )
        write_card(temporary, Made(run, config, origin, modules, dtype, ema), expected)
        open_checkpoint(temporary)  # the key contract, on the files as a reader finds them
    return notes


def _readers(
    config: Config, expected: list[Slot], modules: int, dtype: str, reader: str | None
) -> list[str]:
    """What to know of the reader, or of all. Raises ValueError where the reader cannot use it."""
    found = findings(config.model, expected, modules, dtype)
    mine = [one for one in found if reader in (None, one.reader)]
    if reader is not None and (fatal := [str(one) for one in mine if one.fatal]):
        raise ValueError("\n  ".join([f"--for {reader}:", *fatal]))
    return [str(one) for one in mine]


def _beside_trunk(
    run: Path, out: Path, config: Config, modules: int, notes: list[str], reader: str | None
) -> list[str]:
    """`export_hf` of modules that learned on a frozen trunk."""
    trunk = TrunkFiles(Path(config.train.init_from or ""))
    expected = list(slots(config.model, modules))
    notes += _readers(config, expected, modules, trunk.dtype, reader)
    read, origin, more = _open_run(run, config, expected, modules, ema=False)
    if other := trunk.differences(read, getattr(torch, config.train.dtype)):
        raise ValueError(
            f"{trunk.folder}: {len(other)} tensors are not those that {origin} was trained on, "
            f"{other[0]} among them; name the trunk's folder in train.init_from, or write all "
            "weights anew with --dtype bf16, fp8 or fp32"
        )
    bad: list[str] = []
    # a module repeats the embedding and the output head: these are the trunk's
    new = [slot for slot in expected if slot.alias or slot.key.startswith("mtp.")]

    def read_new(slot: Slot) -> Tensor:
        return trunk.checkpoint.read(slot.key) if slot.alias else read(slot)

    with new_folder(out) as temporary:
        entries = [entry for slot in new for entry in entries_of(slot, trunk.dtype)]
        tensors = _converted(new, read_new, trunk.dtype, bad)
        splice(trunk, temporary, modules, entries, tensors)
        if bad:
            raise ValueError(f"{origin}: {len(bad)} tensor(s) hold nan or infinity:\n{bad[0]}")
        made = Made(run, config, origin, modules, trunk.dtype, ema=False)
        more += write_card(temporary, made, expected)
        open_checkpoint(temporary)  # the key contract, on the files as a reader finds them
    return [
        f"{modules} MTP module(s) from {origin}, stored as the trunk is: {trunk.dtype}",
        f"the trunk's files are those of {trunk.folder}, byte for byte",
        *dict.fromkeys([*notes, *more]),
    ]


def entries_of(slot: Slot, dtype: str) -> list[Entry]:
    """What is written for a slot: itself, and in FP8 the scales of a quantised one."""
    if dtype == "fp8" and slot.quantised:
        scales = Entry(slot.name + SCALE, torch.float32, scale_shape(slot.shape))
        return [Entry(slot.name, torch.float8_e4m3fn, slot.shape), scales]
    return [Entry(slot.name, torch.float32 if slot.is_float32 else TYPES[dtype], slot.shape)]


def _converted(expected: list[Slot], read: Read, dtype: str, bad: list[str]) -> Iterator[Tensor]:
    """The tensors of `entries_of` all slots; `bad` gets the names of non-finite ones."""
    for slot in expected:
        tensor = read(slot)
        if not is_finite(tensor):
            bad.append(f"  {slot.name}")
            tensor = torch.zeros_like(tensor)
        if dtype == "fp8" and slot.quantised:
            codes, scale_inv = quantise(tensor, BLOCK, "stored")
            yield from (codes.contiguous(), scale_inv)
        else:
            yield tensor.to(torch.float32 if slot.is_float32 else TYPES[dtype])


def _open_run(
    run: Path, config: Config, expected: list[Slot], modules: int, ema: bool
) -> tuple[Read, Path, list[str]]:
    """(slot -> tensor, where they come from, notes) of a run's newest weights."""
    stored, notes = newest_weights(run, ema=ema)
    if stored is None and (run / IMPORTED).is_dir():
        return _open_imported(run, expected, modules)
    if stored is None:
        raise ValueError(
            f"{run}: no complete checkpoint in {run / 'checkpoints'}; train the run first"
        )
    newest = stored.folder
    state = meta_model(config.model, config.mtp).state_dict()
    problems = summarise(mismatches(stored.shapes, state))
    progress = min(read_reached(newest)["tokens"] / config.train.total_tokens, 1.0)
    # Only the loss of the deepest module changes the weight of its norm. All ones: it never learnt.
    deepest = f"mtp.layers.{modules - 1}.shared_head.norm.weight"
    if deepest in stored.shapes and bool((stored.read(deepest) == 1).all()):
        problems += _untrained(config, modules, progress)
    if problems:
        raise ValueError(report(newest, problems))

    def read(slot: Slot) -> Tensor:  # only its own range: an expert, not the stack of all experts
        part = state[slot.key][slot.index]
        start = int(part.storage_offset())
        if slot.key + SCALE in stored.shapes:  # a frozen trunk's, in block-FP8
            return StoredMatrices(stored, slot.key)[start // part.numel()]
        return stored.read(slot.key, start, start + part.numel()).view(part.shape)

    return read, newest, notes


def _open_imported(run: Path, expected: list[Slot], modules: int) -> tuple[Read, Path, list[str]]:
    """The same for a run that was imported and not trained yet."""
    checkpoint, settings, stored = open_checkpoint(run / IMPORTED)
    names = {(slot.key, str(slot.index)): slot for slot in stored if not slot.alias}
    if any((slot.key, str(slot.index)) not in names for slot in expected):
        raise ValueError(
            f"{run}: its {modules} MTP module(s) were never "
            "trained; train, or export with --trunk-only"
        )

    def read(slot: Slot) -> Tensor:
        return read_slot(checkpoint, names[slot.key, str(slot.index)], settings.block)

    return read, run / IMPORTED, settings.notes


def _untrained(config: Config, modules: int, progress: float) -> Iterator[str]:
    """MTP modules that are as initialised: no loss reached them, theirs or a deeper one."""
    if isinstance(config.mtp.loss_weight, AdaptiveSchedule):
        return  # its weights were the run's own: the config does not tell them
    source = Path(config.train.init_from or "")
    # trained before this run
    brought = read_settings(source).modules if (source / "config.json").is_file() else 0
    reached = [progress * step / 100 for step in range(101)]
    for module in range(brought, modules):
        if not any(
            any(schedules.depth_loss_weights(config.mtp, point)[module:]) for point in reached
        ):
            yield (
                f"MTP module {module + 1} is as it was initialised: "
                "its loss weight was 0 so far (mtp.loss_weight, "
                "mtp.depth_weights, mtp.curriculum); train on, or export with --trunk-only"
            )


def _copy_tokenizer(run: Path, config: Config, folder: Path) -> tuple[dict[str, Any], list[str]]:
    """Puts the tokenizer into `folder`; returns bos, eos and pad ids, and notes."""
    imported = run / IMPORTED
    copy_beside(imported, folder)
    if (imported / "config.json").is_file():
        content = read_json(imported / "config.json", dict[str, Any], "import the run again")
        return {key: content[key] for key in SPECIAL_IDS if key in content}, []
    tokenizer = tokenizer_of(config, run)
    if tokenizer is None:
        if config.data.task is not None:
            return {}, [
                f"no tokenizer: data.task {config.data.task.type} generates token ids, not text"
            ]
        where = ", ".join(str(entry.path) for entry in config.data.entries)
        return {}, [
            (
                f"no tokenizer: no tokenizer.json in {where}; "
                "put its files beside the weights to use text"
            )
        ]
    shutil.copyfile(tokenizer, folder / "tokenizer.json")
    encoder = recorded_encoder(tokenizer, config.model.vocab_size)
    eos_id = encoder.eos_id
    eos = encoder.tokenizer.id_to_token(eos_id)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": eos,
        "eos_token": eos,
        "pad_token": eos,
    }
    settings |= {"add_bos_token": False, "model_max_length": config.model.max_position_embeddings}
    settings |= {"clean_up_tokenization_spaces": False}
    write_json(folder / "tokenizer_config.json", settings)
    # A training document is followed by the end-of-text token of its predecessor: that token begins
    # a text as well.
    return {"bos_token_id": eos_id, "eos_token_id": eos_id}, []


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A temporary folder that becomes `out` on success and disappears on failure, of a killed
    process at the next call.

    Raises:
        ValueError: `out` exists, or another process is making it.
    """
    exists = ValueError(f"{out} exists already; choose another folder, or delete it")
    if out.exists():
        raise exists
    folder_for(out.parent)
    temporary, locked = (out.with_name(f".{out.name}.{suffix}") for suffix in ("partial", "lock"))
    descriptor = lock(locked, f"{out}: another process is making it; choose another folder")
    try:
        # now: another process may have finished just before this one took the lock
        if out.exists():
            raise exists
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        yield temporary
        sync_tree(temporary)
        os.replace(temporary, out)
        sync(out.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        locked.unlink(missing_ok=True)
        os.close(descriptor)
