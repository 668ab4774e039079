"""What training asks of a data source, and the one of tokenised documents: a split of a prepared
folder, or any Megatron `.bin/.idx` pair.
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from dsv3_mtp.config.task import Stream, Task
from dsv3_mtp.data.megatron import open_pair
from dsv3_mtp.data.shards import INDEX, file_sha256, read_folder_index
from dsv3_mtp.data.stream import DocumentStream

HASH_BLOCK_TOKENS = 1 << 12
VOCAB_SCAN_TOKENS = 1 << 24  # tokens looked at by check_vocab when the vocabulary is not recorded


class DataSource(Protocol):
    """Where rows of tokens come from. None: unknown, or without a number."""

    @property
    def path(self) -> str:
        """What messages and the manifest call it."""

    @property
    def manifest_hash(self) -> str:
        """Of all that its rows depend on: a run is not resumed on other data."""

    @property
    def tokens(self) -> int | None: ...

    @property
    def documents(self) -> int | None: ...

    @property
    def bytes(self) -> int | None:
        """UTF-8 bytes of the text."""

    @property
    def vocab_size(self) -> int | None:
        """All token ids are below it; None: it was not recorded, `id_range` looks."""

    def id_range(self) -> tuple[int, int]:
        """The smallest and the largest token id, as far as the source can tell."""

    @property
    def longest_document(self) -> int | None:
        """In tokens; None: it has no end."""

    @property
    def tokenizer_sha256(self) -> str | None: ...

    @property
    def task(self) -> Task | None:
        """The generated task that it is; None: text."""

    @property
    def text(self) -> "Source | None":
        """Itself where its tokens can be read by position, so that n-gram floors can be counted."""

    def stream(self, seq_len: int, key: tuple[int, int] | None) -> Stream:
        """key: (seed, number of the source) for training; None for validation, in natural order."""


@dataclass(frozen=True)
class Source:
    """N tokens in documents, as one virtual array over memory-mapped shards.

    `vocab_size`, `tokenizer_sha256` and `bytes` (UTF-8 bytes of the text) are None for a plain
    Megatron pair, which does not record them.
    """

    path: str
    manifest_hash: str
    vocab_size: int | None
    tokenizer_sha256: str | None
    bytes: int | None
    shards: tuple[np.ndarray, ...]
    shard_starts: np.ndarray  # (shards + 1,) int64, in tokens
    document_starts: np.ndarray  # (documents + 1,) int64, in tokens
    # as `shards`: a byte per token, 1 where it is a target; None: every token is one
    masks: tuple[np.ndarray, ...] | None = None
    scored_tokens: int | None = None  # of `masks`, all of its ones

    @property
    def targets(self) -> int:
        """Tokens that are targets."""
        return self.tokens if self.scored_tokens is None else self.scored_tokens

    @property
    def task(self) -> None:
        return None

    @property
    def text(self) -> "Source":
        return self

    def stream(self, seq_len: int, key: tuple[int, int] | None) -> DocumentStream:
        return DocumentStream(self, seq_len, key)

    @property
    def tokens(self) -> int:
        return int(self.document_starts[-1])

    @property
    def documents(self) -> int:
        return len(self.document_starts) - 1

    @property
    def longest_document(self) -> int:
        return int(np.diff(self.document_starts).max())

    def id_range(self) -> tuple[int, int]:
        """Of 16 stretches that are spread evenly: reading all of a large corpus takes hours."""
        chunk = VOCAB_SCAN_TOKENS // 16
        starts = np.linspace(0, max(self.tokens - chunk, 0), 16).astype(np.int64)
        low, high = 0, 0
        for start in np.unique(starts):
            ids = self.read(int(start), min(int(start) + chunk, self.tokens))
            low, high = min(low, int(ids.min())), max(high, int(ids.max()))
        return low, high

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) as int64."""
        return self._gather(self.shards, np.empty(stop - start, np.int64), start)

    def read_scored(self, start: int, stop: int) -> np.ndarray:
        """Which of the tokens [start, stop) are targets, bool."""
        if self.masks is None:
            return np.ones(stop - start, np.bool_)
        return self._gather(self.masks, np.empty(stop - start, np.bool_), start)

    def _gather(self, arrays: tuple[np.ndarray, ...], out: np.ndarray, start: int) -> np.ndarray:
        """Fills `out` from position `start` of the arrays of all shards."""
        shard = int(np.searchsorted(self.shard_starts, start, side="right")) - 1
        filled = 0
        while filled < len(out):
            offset = start + filled - int(self.shard_starts[shard])
            piece = arrays[shard][offset : offset + len(out) - filled]
            out[filled : filled + len(piece)] = piece
            filled, shard = filled + len(piece), shard + 1
        return out


def open_source(path: str | Path, split: str, options: str = "") -> Source:
    """Opens the `split` of a prepared folder, or a Megatron prefix, which has no splits.

    options: of `dsv3 prepare`, which a message names where there is nothing at `path`.

    Raises:
        ValueError: nothing is there, or not finished, the split is empty, or a file is damaged.
    """
    path = Path(path)
    if path.is_dir():
        return _open_folder(path, split)
    prefix = path.with_suffix("") if path.suffix in (".bin", ".idx") else path
    if Path(f"{prefix}.idx").is_file() or Path(f"{prefix}.bin").is_file():
        tokens, lengths = open_pair(prefix)
        digest = _pair_hash(Path(f"{prefix}.idx"), tokens)
        return _source(path, digest, {}, None, [tokens], [lengths])
    hint = f"prepare your text with: dsv3 prepare --input FILES --out {path}{options}"
    if Path(f"{path}.partial").is_dir():
        hint = f"{path}.partial is unfinished: run its `dsv3 prepare` again to finish it"
    raise ValueError(
        f"{path}: neither a prepared folder nor a Megatron prefix ({path}.bin, {path}.idx); {hint}"
    )


def splits_of(path: str | Path) -> tuple[str, ...]:
    """The splits of a prepared folder that hold text; of a Megatron prefix none."""
    path = Path(path)
    if not path.is_dir():
        return ()
    index = read_folder_index(path)
    return tuple(split for split, entry in index["splits"].items() if entry["shards"])


def _pair_hash(index: Path, tokens: np.ndarray) -> str:
    """sha256 of the .idx and of 64 blocks of tokens: reading a large .bin would take hours."""
    digest = hashlib.sha256(index.read_bytes())
    for start in np.linspace(0, max(len(tokens) - HASH_BLOCK_TOKENS, 0), 64).astype(np.int64):
        digest.update(tokens[start : start + HASH_BLOCK_TOKENS].tobytes())
    return digest.hexdigest()


def check_vocab(source: DataSource, vocab_size: int) -> None:
    """Raise ValueError when `source` has token ids that a model with `vocab_size` embeddings lacks.

    Evenly spread tokens are looked at: a plain Megatron pair does not record its vocabulary, and a
    file of a prepared folder may be damaged.
    """
    if source.vocab_size is not None and source.vocab_size > vocab_size:
        raise ValueError(
            f"{source.path} was tokenised with vocab_size {source.vocab_size}, but "
            f"model.vocab_size is {vocab_size}; set that to at least {source.vocab_size}, or "
            "prepare the data with a smaller tokenizer"
        )
    low, high = source.id_range()
    if low < 0 or high >= vocab_size:
        raise ValueError(
            f"{source.path} holds token id {low if low < 0 else high}, but model.vocab_size is "
            f"{vocab_size} (ids 0 .. {vocab_size - 1}); set model.vocab_size to that of the "
            "tokenizer that made this data"
        )


def check_documents(source: DataSource, depths: int, lookahead: int) -> None:
    """Raises ValueError: masked documents leave the deepest head, at t_{i+lookahead}, no target."""
    longest = source.longest_document
    if longest is not None and longest < 1 + lookahead:
        raise ValueError(
            f"{source.path}: its longest document has {longest} tokens, so that with "
            f"data.mask_documents: true depth {depths} never has a target; set false, lower "
            "mtp.num_nextn_predict_layers, or take longer documents"
        )


def tokenizer_sha256(path: Path | None) -> str | None:
    """What `check_tokenizers` compares, of a tokenizer.json that may be missing."""
    return file_sha256(path) if path is not None and path.is_file() else None


def check_tokenizers(made: Iterable[tuple[str, str | None]]) -> None:
    """Raises ValueError: data or models, (path, sha256 or None), have different tokenizers."""
    paths: dict[str, str] = {}
    for path, sha256 in made:
        if sha256 is not None:
            paths.setdefault(sha256, path)
    if len(paths) > 1:
        raise ValueError(
            f"{' and '.join(paths.values())} have different tokenizers, so that the same id is "
            "different text; prepare all data with the same tokenizer.json (dsv3 prepare "
            "--tokenizer)"
        )


def _open_folder(folder: Path, split: str) -> Source:
    index = read_folder_index(folder)
    if split not in index["splits"]:
        there = sorted(index["splits"])
        raise ValueError(f"{folder / INDEX}: no split {split!r}, there are {there}")
    entry = index["splits"][split]
    if not entry["shards"]:
        remedy = "prepare it again with another --val-fraction"
        raise ValueError(f"{folder}: the split {split!r} is empty; {remedy}")
    tokens, lengths, masks = [], [], []
    for shard in entry["shards"]:
        array, sizes = open_pair(folder / shard["file"])
        if (len(array), len(sizes)) != (shard["tokens"], shard["documents"]):
            raise ValueError(
                f"{folder / shard['file']}.bin: {len(array)} "
                f"tokens in {len(sizes)} documents, but {INDEX} "
                f"promises {shard['tokens']} in {shard['documents']}; prepare the folder again"
            )
        tokens.append(array)
        lengths.append(sizes)
        if "scored_tokens" in entry:
            masks.append(_open_mask(folder / f"{shard['file']}.scored", len(array)))
    source = _source(folder, index["manifest_hash"], index, entry["bytes"], tokens, lengths)
    if "scored_tokens" not in entry:
        return source
    return replace(source, masks=tuple(masks), scored_tokens=entry["scored_tokens"])


def _open_mask(path: Path, tokens: int) -> np.ndarray:
    """(tokens,) uint8, memory-mapped. Raises ValueError: missing, or of another length."""
    found = path.stat().st_size if path.is_file() else 0
    if found != tokens:
        raise ValueError(
            f"{path}: {found:,} bytes, one for each of {tokens:,} tokens is needed; delete the "
            "folder and prepare it again"
        )
    return np.memmap(path, np.uint8, mode="r")


def _source(
    path: Path,
    manifest_hash: str,
    index: Mapping[str, Any],
    text_bytes: int | None,
    tokens: list[np.ndarray],
    lengths: list[np.ndarray],
) -> Source:
    shard_starts = np.cumsum([0] + [len(array) for array in tokens])
    document_starts = np.concatenate([[0], np.cumsum(np.concatenate(lengths))])
    made = (manifest_hash, index.get("vocab_size"), index.get("tokenizer_sha256"), text_bytes)
    return Source(str(path), *made, tuple(tokens), shard_starts, document_starts)
