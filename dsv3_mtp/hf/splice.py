"""MTP modules that were trained on a frozen trunk, put beside that trunk's own files.

Every file of the trunk's folder is copied byte for byte. One file is new, the modules' weights; two
are edited: the index names that file's tensors, config.json says how many modules there are. So
whatever reads the trunk reads the same trunk, bit for bit, with or without the modules.
"""

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsv3_mtp.files.atomic import write_json
from dsv3_mtp.files.checked import read_json
from dsv3_mtp.files.tensorfile import Entry, write_file
from dsv3_mtp.hf.files import DIGESTS, INDEX, Checkpoint, WeightMap
from dsv3_mtp.hf.keys import Slot
from dsv3_mtp.hf.load import open_checkpoint, read_slot
from dsv3_mtp.hf.settings import HFSettings
from dsv3_mtp.precision.quantise import EDGE

SHARD = "model-mtp.safetensors"
ONE_FILE, FIRST_OF_ONE = "model.safetensors", "model-00001-of-00001.safetensors"
SETTINGS = "config.json"
Read = Callable[[Slot], Tensor]


class TrunkFiles:
    """A folder in DeepSeek-V3's layout that modules can be put beside.

    Raises:
        ValueError: the folder is damaged, holds modules already, or stores its weights in a form
            that this code does not write.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.checkpoint, self.settings, self.stored = open_checkpoint(folder, trunk_only=True)
        layers = self.settings.model.num_hidden_layers
        behind = tuple(f"model.layers.{layers + k}." for k in range(max(self.settings.modules, 1)))
        if any(name.startswith(behind) for name in self.checkpoint.places):
            raise ValueError(
                f"{folder}: holds MTP modules already, and files are copied as they are; write all "
                "weights anew with --dtype bf16, fp8 or fp32"
            )
        self.dtype = _stored_type(self.checkpoint, self.settings, folder)

    def differences(self, read: Read, dtype: torch.dtype) -> list[str]:
        """Names of tensors that a run with weights of `dtype` has otherwise than this trunk."""
        found = []
        for slot in self.stored:
            mine = read_slot(self.checkpoint, slot, self.settings.block)
            kept = torch.float32 if slot.is_float32 else dtype
            if not torch.equal(mine.to(kept).float(), read(slot).to(kept).float()):
                found.append(slot.name)
        return found


def splice(
    trunk: TrunkFiles, out: Path, modules: int, entries: list[Entry], tensors: Iterable[Tensor]
) -> None:
    """Fills the empty folder `out`. tensors: of `entries`, the modules' and in that order."""
    _copy_files(trunk.folder, out)
    content = read_json(trunk.folder / SETTINGS, dict[str, Any], "download it again")
    write_json(out / SETTINGS, content | {"num_nextn_predict_layers": modules})
    digest = write_file(out / SHARD, entries, iter(tensors))
    _write_index(trunk, out, entries, digest)


def _stored_type(checkpoint: Checkpoint, settings: HFSettings, folder: Path) -> str:
    """bf16, fp32 or fp8: what the modules are to be stored as."""
    if settings.block is not None:
        if settings.block != (EDGE, EDGE):
            raise ValueError(
                f"{folder}: its FP8 blocks are {settings.block}, and {EDGE} x {EDGE} are "
                "written; write all weights anew with --dtype bf16, fp8 or fp32"
            )
        return "fp8"
    kept = checkpoint.places["model.embed_tokens.weight"].dtype
    if kept not in ("BF16", "F32"):
        raise ValueError(
            f"{folder}: stores {kept}, and modules are written in bfloat16, float32 or FP8; write "
            "all weights anew with --dtype bf16, fp8 or fp32"
        )
    return "bf16" if kept == "BF16" else "fp32"


def _copy_files(source: Path, out: Path) -> None:
    """All files but the two that are edited. A single file of weights gets the name of a shard:
    readers that find model.safetensors look for no index.
    """
    for path in sorted(source.iterdir()):
        if path.is_file() and path.name not in (INDEX, SETTINGS) and path.name[0] != ".":
            name = FIRST_OF_ONE if path.name == ONE_FILE else path.name
            shutil.copyfile(path, out / name)


def _write_index(trunk: TrunkFiles, out: Path, entries: list[Entry], digest: str) -> None:
    places = trunk.checkpoint.places
    size = sum(place.stop - place.start for place in places.values())
    index: dict[str, Any] = {"metadata": {"total_size": size}, "weight_map": {}}
    if (trunk.folder / INDEX).is_file():
        index = dict(read_json(trunk.folder / INDEX, WeightMap, "download it again"))
    else:
        files = {name: place.file.name for name, place in sorted(places.items())}
        index["weight_map"] = {
            name: FIRST_OF_ONE if file == ONE_FILE else file for name, file in files.items()
        }
    metadata = dict(index.get("metadata") or {})
    if isinstance(metadata.get("total_size"), int):
        metadata["total_size"] += sum(entry.size for entry in entries)
    if isinstance(metadata.get(DIGESTS), dict):
        metadata[DIGESTS] = metadata[DIGESTS] | {SHARD: digest}
    mapped = index["weight_map"] | {entry.name: SHARD for entry in entries}
    write_json(out / INDEX, index | {"metadata": metadata, "weight_map": mapped})
