"""A folder of safetensors files; every fault of its files in one list."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NotRequired

from pydantic import with_config
from torch import Tensor
from typing_extensions import TypedDict

from dsv3_mtp.files.atomic import inside, write_json
from dsv3_mtp.files.checked import OPEN, read_json
from dsv3_mtp.files.digest import difference
from dsv3_mtp.files.tensorfile import Entry, Place, read_places, write_file

INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5_000_000_000


DIGESTS = "dsv3_mtp_digests"  # key in the index's metadata, where each writer may put its own


@with_config(OPEN)
class WeightMap(TypedDict):
    """The index of a folder of shards."""

    weight_map: dict[str, str]
    metadata: NotRequired[dict[str, Any] | None]


class Checkpoint:
    """The tensors of a folder. `problems` lists what is wrong with its files. Tensors may be read
    only where it is empty.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.places: dict[str, Place] = {}
        self.problems: list[tuple[str, str]] = []
        self.digests: dict[str, str] = {}  # of files that this project wrote
        weight_map = self._index()
        files = sorted(set(weight_map.values())) or sorted(
            path.name for path in folder.glob("*.safetensors")
        )
        if not files and not self.problems:
            self.problems.append((str(folder), f"holds neither {INDEX} nor *.safetensors"))
        for name in files:
            self._add(folder / name)
        readable = {place.file.name for place in self.places.values()}
        for tensor, file in weight_map.items():
            place = self.places.get(tensor)
            if file in readable and (place is None or place.file.name != file):
                self.problems.append((tensor, f"{INDEX} puts it into {file}, which lacks it"))
        if weight_map:
            for tensor in self.places.keys() - weight_map.keys():
                self.problems.append(
                    (tensor, f"in {self.places[tensor].file.name}, but not in {INDEX}")
                )

    def read(self, name: str) -> Tensor:
        return self.places[name].read()

    def differences(self) -> list[str]:
        """Files whose content is not what this project wrote; reads all of them."""
        recorded = sorted(self.digests.items())
        found = (difference(self.folder / name, digest) for name, digest in recorded)
        return [text for text in found if text is not None]

    def _index(self) -> dict[str, str]:
        path = self.folder / INDEX
        if not path.is_file():
            if path.is_symlink():
                self.problems.append((INDEX, "is a link that leads to no file"))
            return {}
        try:
            index = read_json(path, WeightMap, "download or export it again")
        except ValueError as error:
            self.problems.append((INDEX, str(error)))
            return {}
        if not index["weight_map"]:
            self.problems.append((INDEX, "names no tensor; download or export it again"))
        recorded = (index.get("metadata") or {}).get(DIGESTS)
        if isinstance(recorded, dict):
            self.digests = {Path(str(name)).name: str(x) for name, x in recorded.items()}
        named = {key: Path(value).name for key, value in index["weight_map"].items()}
        if odd := next((name for name in named.values() if not name.isprintable()), None):
            self.problems.append((INDEX, f"{odd!r} is the name of no file"))
            return {}
        return named

    def _add(self, path: Path) -> None:
        if not inside(path, self.folder):
            self.problems.append((path.name, "is a link out of the folder; put the file there"))
            return
        try:
            places = read_places(path)
        except (OSError, ValueError) as error:
            self.problems.append((path.name, getattr(error, "strerror", None) or str(error)))
            return
        for name, found in places.items():
            if name in self.places:
                self.problems.append(
                    (name, f"in {self.places[name].file.name} and again in {path.name}")
                )
            self.places.setdefault(name, found)


def write_checkpoint(
    folder: Path, entries: list[Entry], tensors: Iterable[Tensor], *, shard_bytes: int
) -> None:
    """Writes model-0000i-of-0000n.safetensors and the index. The bytes depend on the arguments
    alone.

    `tensors` yields the tensors of `entries`, in that order; a shard closes before the entry that
    would take it over `shard_bytes`.
    """
    shards: list[list[Entry]] = [[]]
    for entry in entries:
        if shards[-1] and sum(e.size for e in shards[-1]) + entry.size > shard_bytes:
            shards.append([])
        shards[-1].append(entry)
    stream = iter(tensors)
    weight_map: dict[str, str] = {}
    digests: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= {entry.name: name for entry in shard}
        digests[name] = write_file(folder / name, shard, stream)
    index = {
        "metadata": {"total_size": sum(entry.size for entry in entries), DIGESTS: digests},
        "weight_map": weight_map,
    }
    write_json(folder / INDEX, index)
