"""A prepared folder: index.json, tokenizer.json and shards that are Megatron `.bin/.idx` pairs.

DIR/index.json        format, vocab_size, dtype, eos_id, hashes, origin of the text, and the shards
                      of each split
DIR/tokenizer.json    the tokenizer, as Hugging Face `tokenizers` writes it
DIR/manifest.json     pystdlib and sitelib: every file with its sha256 and split, and of sitelib
                      every package with its version
DIR/train-00000.bin, train-00000.idx, ..., val-00000.bin, val-00000.idx
DIR/train-00000.scored, ...   with --mask prompts: a byte per token, 1 where it is a target
"""

import hashlib
import os
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal, NotRequired

import numpy as np
from pydantic import Field, with_config
from typing_extensions import TypedDict

from dsv3_mtp.data.megatron import write_index
from dsv3_mtp.files.checked import OPEN, read_json

INDEX = "index.json"
FORMAT, VERSION = "dsv3_mtp.tokens", 1
MASKED_VERSION = 2  # with .scored files, which programs of version 1 would pass over
AGAIN = "delete the folder and prepare it again"
Amount = Annotated[int, Field(ge=0)]
# as `_name` makes them: of a file in this folder
ShardName = Annotated[str, Field(pattern=r"^[a-z]+-\d+$")]


@with_config(OPEN)
class Digests(TypedDict):
    """sha256 of the files of a shard."""

    bin: str
    idx: str
    scored: NotRequired[str]


@with_config(OPEN)
class ShardEntry(TypedDict):
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
    shards: list[ShardEntry]
    scored_tokens: NotRequired[Amount]


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
    scored_sha256: NotRequired[str]


@with_config(OPEN)
class SplitState(TypedDict):
    """`SplitWriter.state`."""

    shards: list[ShardEntry]
    bytes: Amount
    open: OpenShard


def read_folder_index(folder: Path) -> FolderIndex:
    """index.json of a prepared folder. Raises ValueError: it is missing or of another format."""
    path = folder / INDEX
    if not path.is_file():
        raise ValueError(
            f"{folder}: has no {INDEX}, so it is no prepared folder; if your text lies there: "
            f"dsv3 prepare --input {folder} --out {folder}-tokens, and name that folder"
        )
    head = read_json(path, dict[str, Any], AGAIN)
    found = (head.get("format"), head.get("version"))
    if found not in ((FORMAT, VERSION), (FORMAT, MASKED_VERSION)):
        raise ValueError(
            f"{path}: format {found}, this program reads "
            f"{(FORMAT, VERSION)} and {(FORMAT, MASKED_VERSION)}; prepare the folder again"
        )
    index = read_json(path, FolderIndex, AGAIN)
    for name, split in index["splits"].items():
        if split["shards"] and not split["bytes"]:
            raise ValueError(f"{path}: damaged (splits.{name}: tokens of 0 bytes); {AGAIN}")
        for key in ("tokens", "documents"):
            if (total := sum(shard[key] for shard in split["shards"])) != split[key]:
                wrong = f"splits.{name}.{key}: {split[key]:,}, its shards have {total:,}"
                raise ValueError(f"{path}: damaged ({wrong}); {AGAIN}")
    return index


def text_sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify_folder(folder: Path) -> None:
    """Compares every file of a folder with its sha256. Raises ValueError naming all that differ."""
    index = read_folder_index(folder)
    expected = {"tokenizer.json": index["tokenizer_sha256"]}
    for split in index["splits"].values():
        for shard in split["shards"]:
            expected |= {f"{shard['file']}.{key}": str(x) for key, x in shard["sha256"].items()}
    if problems := _differences(folder, expected):
        remedy = f"{folder} is damaged: delete it and prepare it again"
        raise ValueError("\n".join([*problems, remedy]))


def _differences(folder: Path, expected: dict[str, str]) -> list[str]:
    problems = []
    for name, digest in expected.items():
        actual = file_sha256(folder / name) if (folder / name).is_file() else "missing"
        if actual != digest:
            problems.append(f"{folder / name}: sha256 is {actual}, recorded was {digest}")
    return problems


class SplitWriter:
    """Appends the documents of one split to shards; goes on from any `state()` after a crash.

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
        masked: bool = False,
        state: dict[str, Any] | None = None,
    ) -> None:
        """masked: not every token is a target, and .scored files say which are."""
        self.folder, self.split, self.dtype, self.shard_tokens = folder, split, dtype, shard_tokens
        self.masked = masked
        self.shards: list[dict[str, Any]] = []
        self.bytes = self.scored_tokens = 0  # of the whole split
        self.tokens = self.documents = 0  # of the open shard
        # .bin and .sizes of the open shard, and .scored
        self._files: list[BinaryIO] = []
        self._hash, self._scored_hash = hashlib.sha256(), hashlib.sha256()
        if state is not None:
            self._restore(state)

    def append(self, tokens: np.ndarray, text_bytes: int, scored: np.ndarray | None = None) -> None:
        """Add one document: its token ids, end of text included, the UTF-8 bytes of its text, and
        where the split is masked which tokens are targets, (n,) bool.
        """
        binary, sizes, *mask = self._files or self._open("wb")
        if self.masked:
            assert scored is not None and len(scored) == len(tokens)
            flags = scored.astype(np.uint8).tobytes()
            mask[0].write(flags)
            self._scored_hash.update(flags)
            self.scored_tokens += int(scored.sum())
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
        if not self._files:
            return
        digest = self._hash.hexdigest()
        self.flush()
        for file in self._files:
            file.close()
        write_index(self._path("idx"), self.dtype, np.fromfile(self._path("sizes"), np.int32))
        sha256 = {"bin": digest, "idx": file_sha256(self._path("idx"))}
        if self.masked:
            sha256["scored"] = self._scored_hash.hexdigest()
        counts = {"tokens": self.tokens, "documents": self.documents}
        self.shards.append({"file": self._name(), **counts, "sha256": sha256})
        self.tokens = self.documents = 0
        self._files = []
        self._hash, self._scored_hash = hashlib.sha256(), hashlib.sha256()

    def flush(self) -> None:
        for file in self._files:
            file.flush()
            os.fsync(file.fileno())

    def state(self) -> dict[str, Any]:
        """What is on disk after `flush`, JSON-able."""
        open_shard: dict[str, Any] = {"tokens": self.tokens, "documents": self.documents}
        open_shard["sha256"] = self._hash.hexdigest()
        state = {"shards": list(self.shards), "bytes": self.bytes, "open": open_shard}
        if self.masked:
            open_shard["scored_sha256"] = self._scored_hash.hexdigest()
            state["scored_tokens"] = self.scored_tokens
        return state

    @property
    def total_tokens(self) -> int:
        return self.tokens + sum(shard["tokens"] for shard in self.shards)

    def summary(self) -> dict[str, Any]:
        """The entry of index.json. All shards must be closed."""
        counts = {key: sum(s[key] for s in self.shards) for key in ("tokens", "documents")}
        scored = {"scored_tokens": self.scored_tokens} if self.masked else {}
        return {**counts, "bytes": self.bytes, "shards": self.shards, **scored}

    def _restore(self, state: dict[str, Any]) -> None:
        """Check the finished shards and cut the open one back to what `state` describes."""
        expected = {
            f"{s['file']}.{suffix}": d for s in state["shards"] for suffix, d in s["sha256"].items()
        }
        problems = _differences(self.folder, expected)
        self.shards, self.bytes = list(state["shards"]), state["bytes"]
        self.tokens, self.documents = state["open"]["tokens"], state["open"]["documents"]
        self.scored_tokens = state.get("scored_tokens", 0)
        if self.documents:
            sizes = {"bin": self.tokens * self.dtype.itemsize, "sizes": self.documents * 4}
            if self.masked:
                sizes["scored"] = self.tokens
            for suffix, size in sizes.items():
                path = self._path(suffix)
                actual = path.stat().st_size if path.is_file() else 0
                if actual < size:
                    problems.append(f"{path}: {actual} bytes, at least {size} were recorded")
                else:
                    os.truncate(path, size)
            if not problems:
                digests = {self._path("bin").name: state["open"]["sha256"]}
                if self.masked:
                    digests[self._path("scored").name] = state["open"]["scored_sha256"]
                problems = _differences(self.folder, digests)
        if problems:
            remedy = f"cannot go on from {self.folder}: delete it and start again"
            raise ValueError("\n".join([*problems, remedy]))
        if self.documents:
            self._hash.update(self._path("bin").read_bytes())
            if self.masked:
                self._scored_hash.update(self._path("scored").read_bytes())
            self._open("ab")

    def _open(self, mode: Literal["wb", "ab"]) -> list[BinaryIO]:
        suffixes = ("bin", "sizes", "scored") if self.masked else ("bin", "sizes")
        self._files = [open(self._path(suffix), mode) for suffix in suffixes]  # noqa: SIM115
        return self._files

    def _name(self) -> str:
        return f"{self.split}-{len(self.shards):05d}"

    def _path(self, suffix: str) -> Path:
        return self.folder / f"{self._name()}.{suffix}"
