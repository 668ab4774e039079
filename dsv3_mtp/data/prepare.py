"""Text to token shards: split, tokenise on all cores, write; resumable, and byte-identical however often interrupted.

Everything is written to DIR.partial, which becomes DIR with one rename at the end. DIR.partial/progress.json says how far
the shards on disk go; whatever was written after it is cut off and made again. A lock in DIR.partial lets a second
process wait for the first.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dsv3_mtp.data.corpus import StdlibInputs, stdlib_inputs
from dsv3_mtp.data.documents import Document, FileInputs
from dsv3_mtp.data.megatron import token_dtype
from dsv3_mtp.data.shards import (
    FORMAT,
    INDEX,
    SPLITS,
    VERSION,
    SplitWriter,
    file_sha256,
    read_folder_index,
    write_atomic,
    write_json,
)
from dsv3_mtp.data.tokenizer import DocumentEncoder, fim_split, load_encoder, train_tokenizer

PROGRESS, LOCK, TOKENIZER, MANIFEST = "progress.json", ".lock", "tokenizer.json", "manifest.json"
BATCH_CHARACTERS, BATCH_DOCUMENTS = 2_000_000, 2_000
SAVE_SECONDS = 2.0
TRAIN_CHARACTERS = 256_000_000  # a new tokenizer is trained on the first this many characters of the train split

Progress = Callable[[int, int, int], None]  # input bytes done, input bytes in all, tokens written


@dataclass(frozen=True)
class Arguments:
    """What decides the contents of a prepared folder.

    corpus         "pystdlib", or None for `inputs`: files, folders and globs
    tokenizer      a tokenizer.json, or None to train one with `vocab_size` tokens on the train split
    eos            its end-of-text token (None: the first of the common names that it has)
    val_fraction   share of the documents, chosen by content hash, that are val (pystdlib: a tenth, by path hash)
    fim_rate       share of the train documents rearranged for fill-in-the-middle; val stays plain so that losses compare
    shard_tokens   a shard ends with the document that reaches this
    """

    corpus: str | None = None
    inputs: tuple[str, ...] = ()
    text_key: str = "text"
    tokenizer: str | None = None
    vocab_size: int | None = None
    eos: str | None = None
    val_fraction: float = 0.1
    fim_rate: float = 0.0
    shard_tokens: int = 100_000_000
    seed: int = 0

    def __post_init__(self) -> None:
        problems = [
            text
            for wrong, text in (
                ((self.corpus is None) == (not self.inputs), "give either a corpus or inputs (--corpus or --input)"),
                (self.corpus not in (None, "pystdlib"), f"corpus {self.corpus!r}: the only one is 'pystdlib'"),
                (
                    (self.tokenizer is None) == (self.vocab_size is None),
                    "give either a tokenizer.json or the vocab_size of one to train (--tokenizer or --vocab-size)",
                ),
                (not 0 <= self.val_fraction < 1, f"val_fraction {self.val_fraction}: must be in [0, 1)"),
                (
                    self.corpus == "pystdlib" and self.val_fraction != 0.1,
                    f"val_fraction {self.val_fraction}: the split of pystdlib is fixed; leave it at 0.1",
                ),
                (not 0 <= self.fim_rate <= 1, f"fim_rate {self.fim_rate}: must be in [0, 1]"),
                (self.shard_tokens < 1, f"shard_tokens {self.shard_tokens}: must be at least 1"),
            )
            if wrong
        ]
        if problems:
            raise ValueError("\n".join(problems))


def build_corpus(
    out_dir: str | Path, *, vocab_size: int, shard_tokens: int = Arguments.shard_tokens, seed: int = 0
) -> dict[str, Any]:
    """Prepare pystdlib with a tokenizer of `vocab_size` trained on its train split; returns its index.

    Safe to call from several processes: one builds, the others wait. Returns at once when `out_dir` is already that;
    raises ValueError when it is something else.
    """
    return prepare(out_dir, Arguments(corpus="pystdlib", vocab_size=vocab_size, shard_tokens=shard_tokens, seed=seed))


def prepare(out_dir: str | Path, arguments: Arguments, *, progress: Progress | None = None) -> dict[str, Any]:
    """Make the prepared folder `out_dir`, or go on with it where an interrupted call with the same arguments stopped.

    Returns the contents of its index.json. Raises ValueError for bad input, naming file and record, and when
    `out_dir` or `out_dir`.partial were made with other arguments.
    """
    out = Path(out_dir)
    partial = out.with_name(out.name + ".partial")
    inputs = stdlib_inputs() if arguments.corpus else FileInputs(list(arguments.inputs), **_file_options(arguments))
    recorded = _recorded(arguments, inputs)
    if out.exists() and any(out.iterdir()):
        return _existing(out, recorded)
    with _exclusive(partial):
        if out.exists() and any(out.iterdir()):  # another process made it while this one waited
            shutil.rmtree(partial, ignore_errors=True)
            return _existing(out, recorded)
        index = _build(partial, arguments, recorded, inputs, progress)
        os.replace(partial, out)
        (out / LOCK).unlink()
    return index


def _file_options(arguments: Arguments) -> dict[str, Any]:
    return {"text_key": arguments.text_key, "val_fraction": arguments.val_fraction}


def _recorded(arguments: Arguments, inputs: StdlibInputs | FileInputs) -> dict[str, Any]:
    """The arguments as index.json keeps them: the tokenizer by its hash, the inputs by name and size."""
    recorded = asdict(arguments) | {"inputs": list(arguments.inputs)}
    if arguments.tokenizer is not None and Path(arguments.tokenizer).is_file():
        recorded["tokenizer"] = file_sha256(Path(arguments.tokenizer))
    if isinstance(inputs, StdlibInputs):
        recorded["files"] = inputs.fingerprint
    else:
        recorded["files"] = [[str(path), size] for path, size in zip(inputs.files, inputs.sizes, strict=True)]
    return recorded


def _existing(out: Path, recorded: dict[str, Any]) -> dict[str, Any]:
    index = read_folder_index(out)
    _compare(out, index["arguments"], recorded)
    return index


def _compare(folder: Path, there: dict[str, Any], now: dict[str, Any]) -> None:
    differences = []
    for key, value in now.items():
        if there.get(key) != value:
            long = key == "files" or (key == "tokenizer" and None not in (there.get(key), value))
            differences.append(f"{key}: other contents" if long else f"{key}: {there.get(key)} there, {value} now")
    if differences:
        raise ValueError(
            f"{folder} was made with other arguments; repeat those, choose another --out, or delete it:\n  "
            + "\n  ".join(differences)
        )


@contextlib.contextmanager
def _exclusive(folder: Path) -> Iterator[None]:
    """Hold the lock in `folder`, creating both; waits for another holder. Released by the kernel if this process dies."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError), open(folder / LOCK, "w") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"waiting for the process that is writing {folder}", file=sys.stderr, flush=True)
                fcntl.flock(handle, fcntl.LOCK_EX)
            # The holder before may have renamed the folder away, with this lock in it.
            if os.stat(folder / LOCK).st_ino == os.fstat(handle.fileno()).st_ino:
                yield
                return


def _build(
    partial: Path,
    arguments: Arguments,
    recorded: dict[str, Any],
    inputs: StdlibInputs | FileInputs,
    progress: Progress | None,
) -> dict[str, Any]:
    state = _saved_state(partial, recorded, inputs)
    if state is None:
        encoder = _make_tokenizer(partial, arguments, inputs)
        state = {"file": 0, "record": 0, "documents": 0, "empty": 0, "manifest_hash": "", "splits": {}}
        state |= {"arguments": recorded, "inputs": inputs.fingerprint, "tokenizer_sha256": encoder.sha256}
    else:
        encoder = load_encoder(partial / TOKENIZER, eos=arguments.eos)
    if arguments.fim_rate > 0 and encoder.fim_ids is None:
        raise ValueError(
            f"fim_rate {arguments.fim_rate}: {arguments.tokenizer} has no fill-in-the-middle tokens such as <|fim_begin|> "
            f"<|fim_hole|> <|fim_end|>; use a tokenizer with them or --fim-rate 0"
        )
    dtype = token_dtype(encoder.vocab_size)
    writers = {
        split: SplitWriter(
            partial, split, dtype=dtype, shard_tokens=arguments.shard_tokens, state=state["splits"].get(split)
        )
        for split in SPLITS
    }
    _Tokenising(partial, arguments, inputs, encoder, writers, state, progress).run()
    return _finish(partial, arguments, inputs, encoder, writers, state)


def _saved_state(partial: Path, recorded: dict[str, Any], inputs: StdlibInputs | FileInputs) -> dict[str, Any] | None:
    """progress.json of an interrupted run, checked against this one; None after emptying the folder if there is none."""
    path = partial / PROGRESS
    if not path.is_file():
        for left in partial.iterdir():
            if left.name != LOCK:
                left.unlink()
        return None
    state = json.loads(path.read_text(encoding="utf-8"))
    _compare(partial, state["arguments"], recorded)
    if state["inputs"] != inputs.fingerprint:
        raise ValueError(f"{partial}: the input files changed since it was interrupted; delete it and start again")
    if not (partial / TOKENIZER).is_file() or file_sha256(partial / TOKENIZER) != state["tokenizer_sha256"]:
        raise ValueError(f"{partial / TOKENIZER}: is missing or was changed; delete {partial} and start again")
    return state


def _make_tokenizer(partial: Path, arguments: Arguments, inputs: StdlibInputs | FileInputs) -> DocumentEncoder:
    if arguments.tokenizer is not None:
        load_encoder(Path(arguments.tokenizer), eos=arguments.eos)  # so that errors name the user's file
        content = Path(arguments.tokenizer).read_bytes()
    else:
        assert arguments.vocab_size is not None
        content = train_tokenizer(_train_texts(inputs), arguments.vocab_size).encode()
    write_atomic(partial / TOKENIZER, content)
    return load_encoder(partial / TOKENIZER, eos=arguments.eos)


def _train_texts(inputs: StdlibInputs | FileInputs) -> Iterator[str]:
    characters = 0
    for document in inputs.read():
        if document.split == "train":
            yield document.text
            characters += len(document.text)
            if characters >= TRAIN_CHARACTERS:
                return


@dataclass
class _Tokenising:
    """The main loop: batches of documents are read here, encoded in other threads, and written here in order."""

    partial: Path
    arguments: Arguments
    inputs: StdlibInputs | FileInputs
    encoder: DocumentEncoder
    writers: dict[str, SplitWriter]
    state: dict[str, Any]
    progress: Progress | None
    saved_at: float = 0.0

    def run(self) -> None:
        self._save()
        number = self.state["documents"]
        waiting: deque[tuple[list[Document], Future[list[np.ndarray]]]] = deque()
        with ThreadPoolExecutor(2) as pool:
            for batch in _batches(self.inputs.read(self.state["file"], self.state["record"])):
                waiting.append((batch, pool.submit(self._encode, batch, number)))
                number += len(batch)
                if len(waiting) > 2:
                    self._write(*waiting.popleft())
            while waiting:
                self._write(*waiting.popleft())

    def _encode(self, batch: list[Document], number: int) -> list[np.ndarray]:
        pieces = []
        for i, document in enumerate(batch):
            rate = self.arguments.fim_rate if document.split == "train" else 0.0
            pieces.append(fim_split(document.text, rate=rate, seed=self.arguments.seed, document=number + i))
        return self.encoder.encode(pieces)

    def _write(self, batch: list[Document], encoded: "Future[list[np.ndarray]]") -> None:
        state, shards = self.state, sum(len(writer.shards) for writer in self.writers.values())
        for document, tokens in zip(batch, encoded.result(), strict=True):
            if document.text:
                self.writers[document.split].append(tokens, len(document.text.encode()))
            state["empty"] += not document.text
            link = f"{state['manifest_hash']} {document.split} {document.sha256.hex()}"
            state["manifest_hash"] = hashlib.sha256(link.encode()).hexdigest()
        state["documents"] += len(batch)
        state["file"], state["record"] = batch[-1].file, batch[-1].record
        closed = sum(len(writer.shards) for writer in self.writers.values()) > shards
        if closed or time.monotonic() > self.saved_at + SAVE_SECONDS:
            self._save()
        if self.progress is not None:
            done = sum(self.inputs.sizes[: batch[-1].file]) + batch[-1].done
            tokens_written = sum(writer.total_tokens for writer in self.writers.values())
            self.progress(done, sum(self.inputs.sizes), tokens_written)

    def _save(self) -> None:
        for split, writer in self.writers.items():
            writer.flush()
            self.state["splits"][split] = writer.state()
        write_json(self.partial / PROGRESS, self.state)
        self.saved_at = time.monotonic()


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if characters >= BATCH_CHARACTERS or len(batch) >= BATCH_DOCUMENTS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _finish(
    partial: Path,
    arguments: Arguments,
    inputs: StdlibInputs | FileInputs,
    encoder: DocumentEncoder,
    writers: dict[str, SplitWriter],
    state: dict[str, Any],
) -> dict[str, Any]:
    """Close the shards, write index.json, and leave nothing else in the folder."""
    for writer in writers.values():
        writer.close_shard()
    splits = {split: writer.summary() for split, writer in writers.items()}
    documents = {split: summary["documents"] for split, summary in splits.items()}
    if documents["train"] == 0 or (documents["val"] == 0 and arguments.val_fraction > 0):
        raise ValueError(
            f"{state['documents']} documents ({state['empty']} of them empty) gave {documents['train']} for train and "
            f"{documents['val']} for val; give more text, or another --val-fraction (0: no val split)"
        )
    index = {
        "format": FORMAT,
        "version": VERSION,
        "vocab_size": encoder.vocab_size,
        "dtype": token_dtype(encoder.vocab_size).name,
        "eos_id": encoder.eos_id,
        "tokenizer_sha256": encoder.sha256,
        "manifest_hash": state["manifest_hash"],
        "source": {"inputs": list(arguments.inputs)},
        "empty_documents": state["empty"],
        "arguments": state["arguments"],
        "splits": splits,
    }
    if isinstance(inputs, StdlibInputs):
        index |= {"manifest_hash": inputs.fingerprint}
        index["source"] = {"corpus": "pystdlib", "python": sys.version.split()[0]}
        files = [{"path": path, "sha256": sha256, "split": split} for path, sha256, split in inputs.manifest]
        write_json(partial / MANIFEST, {"manifest_hash": inputs.fingerprint, **index["source"], "files": files})
    write_json(partial / INDEX, index)
    for left in [partial / PROGRESS, *partial.glob("*.sizes")]:
        left.unlink(missing_ok=True)
    return index
