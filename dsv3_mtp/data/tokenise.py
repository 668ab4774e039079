"""The main loop of a preparation: read documents, encode in other threads, write in order."""

import hashlib
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import with_config
from typing_extensions import TypedDict

from dsv3_mtp.data.documents import Document, Inputs
from dsv3_mtp.data.shards import Amount, SplitState, SplitWriter
from dsv3_mtp.data.tokenizer import DocumentEncoder, fim_split
from dsv3_mtp.files.atomic import write_json
from dsv3_mtp.files.checked import OPEN

PROGRESS = "progress.json"
BATCH_CHARACTERS, BATCH_DOCUMENTS = 2_000_000, 2_000
SAVE_SECONDS = 2.0


@with_config(OPEN)
class TokenisingState(TypedDict):
    """progress.json."""

    file: Amount
    record: Amount
    documents: Amount
    empty: Amount
    manifest_hash: str
    splits: dict[str, SplitState]
    arguments: dict[str, Any]
    inputs: str
    tokenizer_sha256: str


Encoded = tuple[np.ndarray, np.ndarray | None]  # token ids; which are targets (None: all)
# of input bytes done, input bytes in all, tokens written
ProgressCallback = Callable[[int, int, int], None]


@dataclass
class Tokenising:
    """Turns `inputs` from the position in `state`, kept in progress.json, into tokens.

    `state` is saved whenever a shard is closed and every SAVE_SECONDS. It describes what is safely
    on disk, so that neither the batches nor the moments of saving show in the result.
    """

    partial: Path
    inputs: Inputs
    encoder: DocumentEncoder
    writers: dict[str, SplitWriter]
    state: dict[str, Any]
    _: KW_ONLY
    fim_rate: float
    seed: int
    progress: ProgressCallback | None = None
    saved_at: float = 0.0

    def run(self) -> None:
        self._save()
        number = self.state["documents"]
        waiting: deque[tuple[list[Document], Future[list[Encoded]]]] = deque()
        with ThreadPoolExecutor(2) as pool:
            for batch in _batches(self.inputs.read(self.state["file"], self.state["record"])):
                waiting.append((batch, pool.submit(self._encode, batch, number)))
                number += len(batch)
                if len(waiting) > 2:
                    self._write(*waiting.popleft())
            while waiting:
                self._write(*waiting.popleft())

    def _encode(self, batch: list[Document], number: int) -> list[Encoded]:
        if any(document.pieces for document in batch):
            return [self.encoder.encode_pieces(document.pieces) for document in batch]
        pieces = []
        for i, document in enumerate(batch):
            rate = self.fim_rate if document.split == "train" else 0.0
            pieces.append(fim_split(document.text, rate=rate, seed=self.seed, document=number + i))
        return [(ids, None) for ids in self.encoder.encode(pieces)]

    def _write(self, batch: list[Document], encoded: Future[list[Encoded]]) -> None:
        state, shards = self.state, sum(len(writer.shards) for writer in self.writers.values())
        for document, (tokens, scored) in zip(batch, encoded.result(), strict=True):
            if document.text:
                text = document.text
                if scored is not None:  # bits per byte count the targets alone
                    text = "".join(piece.text for piece in document.pieces if piece.scored)
                self.writers[document.split].append(tokens, len(text.encode()), scored)
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
