"""A prepared folder: index.json, tokenizer.json and shards that are Megatron `.bin/.idx` pairs.

DIR/index.json        format, vocab_size, dtype, eos_id, hashes, origin of the text, and per split its shards
DIR/tokenizer.json    the tokenizer, as Hugging Face `tokenizers` writes it
DIR/manifest.json     pystdlib and sitelib: every file with its sha256 and split, and of sitelib every
                      package with its version
DIR/train-00000.bin, train-00000.idx, ..., val-00000.bin, val-00000.idx
"""

import hashlib
import os
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal

import numpy as np
from pydantic import Field, with_config
from typing_extensions import TypedDict

from dsv3_mtp.data.megatron import write_index
from dsv3_mtp.files.checked import OPEN, read_json

INDEX = "index.json"
FORMAT, VERSION = "dsv3_mtp.tokens", 1
AGAIN = "delete the folder and prepare it again"
Amount = Annotated[int, Field(ge=0)]
# as `_name` makes them: of a file in this folder
ShardName = Annotated[str, Field(pattern=r"^[a-z]+-\d+$")]


@with_config(OPEN)
class Digests(TypedDict):
    """sha256 of the two files of a shard."""

    bin: str
    idx: str


@with_config(OPEN)
class Shard(TypedDict):
    """One `.bin/.idx` pair in index.json."""

    file: ShardName
    tokens: Amount
    documents: Amount
    sha256: Digests


@with_config(OPEN)
class Split(TypedDict):
    """All shards of train or val, and the UTF-8 bytes of their text."""

    tokens: Amount
    documents: Amount
    bytes: Amount
    shards: list[Shard]


@with_config(OPEN)
class FolderIndex(TypedDict):
    """index.json."""

    vocab_size: Annotated[int, Field(ge=1)]
    eos_id: Amount
    tokenizer_sha256: str
    manifest_hash: str
    arguments: dict[str, Any]
    splits: dict[str, Split]


@with_config(OPEN)
class OpenShard(TypedDict):
    """What is on disk of a shard that is still being written."""

    tokens: Amount
    documents: Amount
    sha256: str


@with_config(OPEN)
class SplitState(TypedDict):
    """`SplitWriter.state`."""

    shards: list[Shard]
    bytes: Amount
    open: OpenShard


def read_folder_index(folder: Path) -> FolderIndex:
    """index.json of a prepared folder. Raises ValueError when it is missing or of another
    format.
    """
    path = folder / INDEX
    if not path.is_file():
        raise ValueError(
            f"{folder}: has no {INDEX}, so it is no prepared "
            "folder; make one with tools/prepare_data.py"
        )
    head = read_json(path, dict[str, Any], AGAIN)
    found = (head.get("format"), head.get("version"))
    if found != (FORMAT, VERSION):
        raise ValueError(
            f"{path}: format {found}, this program reads "
            f"{(FORMAT, VERSION)}; prepare the folder again"
        )
    index = read_json(path, FolderIndex, AGAIN)
    for name, split in index["splits"].items():
        if split["shards"] and not split["bytes"]:
            raise ValueError(f"{path}: damaged (splits.{name}: tokens of 0 bytes); {AGAIN}")
    return index


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify_folder(folder: Path) -> None:
    """Compare every file of a prepared folder with its sha256. Raises ValueError naming all that
    differ.
    """
    index = read_folder_index(folder)
    expected = {"tokenizer.json": index["tokenizer_sha256"]}
    for split in index["splits"].values():
        for shard in split["shards"]:
            expected |= {f"{shard['file']}.{key}": str(x) for key, x in shard["sha256"].items()}
    problems = _differences(folder, expected)
    if problems:
        raise ValueError(
            "\n".join([*problems, f"{folder} is damaged: delete it and prepare it again"])
        )


def _differences(folder: Path, expected: dict[str, str]) -> list[str]:
    problems = []
    for name, digest in expected.items():
        actual = file_sha256(folder / name) if (folder / name).is_file() else "missing"
        if actual != digest:
            problems.append(f"{folder / name}: sha256 is {actual}, recorded was {digest}")
    return problems


class SplitWriter:
    """Appends the documents of one split to shards; can go on from any earlier `state()` after a
    crash.

    A shard is closed with the document that brings it to `shard_tokens` tokens. While it is open,
    the lengths of its documents are in NAME.sizes; its .idx is written when it is closed.
    """

    def __init__(
        self,
        folder: Path,
        split: str,
        *,
        dtype: np.dtype,
        shard_tokens: int,
        state: dict[str, Any] | None = None,
    ) -> None:
        self.folder, self.split, self.dtype, self.shard_tokens = folder, split, dtype, shard_tokens
        self.shards: list[dict[str, Any]] = []
        self.bytes = 0  # of the whole split
        self.tokens = self.documents = 0  # of the open shard
        self._files: tuple[BinaryIO, BinaryIO] | None = None  # .bin and .sizes of the open shard
        self._hash = hashlib.sha256()
        if state is not None:
            self._restore(state)

    def append(self, tokens: np.ndarray, text_bytes: int) -> None:
        """Add one document: its token ids, end of text included, and the UTF-8 bytes of its
        text.
        """
        binary, sizes = self._files or self._open("wb")
        raw = tokens.astype(self.dtype).tobytes()
        binary.write(raw)
        self._hash.update(raw)
        sizes.write(np.int32(len(tokens)).tobytes())
        self.tokens += len(tokens)
        self.documents += 1
        self.bytes += text_bytes
        if self.tokens >= self.shard_tokens:
            self.close_shard()

    def close_shard(self) -> None:
        """Finish the open shard, if there is one."""
        if self._files is None:
            return
        digest = self._hash.hexdigest()
        self.flush()
        for file in self._files:
            file.close()
        write_index(self._path("idx"), self.dtype, np.fromfile(self._path("sizes"), np.int32))
        sha256 = {"bin": digest, "idx": file_sha256(self._path("idx"))}
        shard = {
            "file": self._name(),
            "tokens": self.tokens,
            "documents": self.documents,
            "sha256": sha256,
        }
        self.shards.append(shard)
        self.tokens = self.documents = 0
        self._files = None
        self._hash = hashlib.sha256()

    def flush(self) -> None:
        for file in self._files or ():
            file.flush()
            os.fsync(file.fileno())

    def state(self) -> dict[str, Any]:
        """What is on disk after `flush`, JSON-able."""
        open_shard = {
            "tokens": self.tokens,
            "documents": self.documents,
            "sha256": self._hash.hexdigest(),
        }
        return {"shards": list(self.shards), "bytes": self.bytes, "open": open_shard}

    @property
    def total_tokens(self) -> int:
        return self.tokens + sum(shard["tokens"] for shard in self.shards)

    def summary(self) -> dict[str, Any]:
        """The entry of index.json. All shards must be closed."""
        return {
            "tokens": sum(shard["tokens"] for shard in self.shards),
            "documents": sum(shard["documents"] for shard in self.shards),
            "bytes": self.bytes,
            "shards": self.shards,
        }

    def _restore(self, state: dict[str, Any]) -> None:
        """Check the finished shards and cut the open one back to what `state` describes."""
        expected = {
            f"{s['file']}.{suffix}": d for s in state["shards"] for suffix, d in s["sha256"].items()
        }
        problems = _differences(self.folder, expected)
        self.shards, self.bytes = list(state["shards"]), state["bytes"]
        self.tokens, self.documents = state["open"]["tokens"], state["open"]["documents"]
        if self.documents:
            for suffix, size in (
                ("bin", self.tokens * self.dtype.itemsize),
                ("sizes", self.documents * 4),
            ):
                path = self._path(suffix)
                actual = path.stat().st_size if path.is_file() else 0
                if actual < size:
                    problems.append(f"{path}: {actual} bytes, at least {size} were recorded")
                else:
                    os.truncate(path, size)
            if not problems:
                problems = _differences(
                    self.folder, {self._path("bin").name: state["open"]["sha256"]}
                )
        if problems:
            raise ValueError(
                "\n".join(
                    [*problems, f"cannot go on from {self.folder}: delete it and start again"]
                )
            )
        if self.documents:
            self._hash.update(self._path("bin").read_bytes())
            self._open("ab")

    def _open(self, mode: Literal["wb", "ab"]) -> tuple[BinaryIO, BinaryIO]:
        self._files = open(self._path("bin"), mode), open(self._path("sizes"), mode)  # noqa: SIM115
        return self._files

    def _name(self) -> str:
        return f"{self.split}-{len(self.shards):05d}"

    def _path(self, suffix: str) -> Path:
        return self.folder / f"{self._name()}.{suffix}"
