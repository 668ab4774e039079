"""A prepared pystdlib, and Megatron files made from the format's description, not by the package's
writer.
"""

import itertools
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dsv3_mtp.data.prepare import Arguments, prepare
from dsv3_mtp.data.source import Source, open_source
from dsv3_mtp.data.stdlib import stdlib_inputs


@pytest.fixture(scope="session")
def small_stdlib(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library folder with the 120 smallest files of the real one, since building from all takes
    seconds.
    """
    inputs, root = stdlib_inputs(), tmp_path_factory.mktemp("lib")
    for name, text in sorted(inputs.texts, key=lambda entry: len(entry[1]))[:120]:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(text.encode())
    return root


@pytest.fixture(scope="session")
def pystdlib(small_stdlib: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded corpus, prepared."""
    folder = tmp_path_factory.mktemp("corpus") / "pystdlib-512"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sysconfig.get_path", lambda name: str(small_stdlib))
        prepare(folder, Arguments(corpus="pystdlib", vocab_size=512))
    return folder


def write_megatron(prefix: Path, documents: list[list[list[int]]], *, code: int = 4) -> Path:
    """PREFIX.bin/.idx of documents, each a list of sequences of token ids."""
    letter = {1: "B", 2: "b", 3: "h", 4: "i", 5: "q", 7: "f", 8: "H"}[code]
    sequences = [sequence for document in documents for sequence in document]
    binary, offsets = b"", []
    for sequence in sequences:
        offsets.append(len(binary))
        binary += struct.pack(f"<{len(sequence)}{letter}", *sequence)
    doc_idx = np.cumsum([0] + [len(document) for document in documents]).tolist()
    header = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, len(sequences), len(doc_idx))
    sizes = struct.pack(f"<{len(sequences)}i", *map(len, sequences))
    pointers = struct.pack(f"<{len(sequences)}q", *offsets)
    Path(f"{prefix}.bin").write_bytes(binary)
    Path(f"{prefix}.idx").write_bytes(
        header + sizes + pointers + struct.pack(f"<{len(doc_idx)}q", *doc_idx)
    )
    return prefix


@pytest.fixture
def megatron(tmp_path: Path) -> Callable[..., Path]:
    """A function documents -> prefix, see write_megatron; `name` tells several apart."""

    def make(documents: list[list[list[int]]], *, code: int = 4, name: str = "tokens") -> Path:
        return write_megatron(tmp_path / name, documents, code=code)

    return make


@pytest.fixture
def make_source(tmp_path_factory: pytest.TempPathFactory) -> Callable[[list[int]], Source]:
    """A function document lengths -> Source in which every token id is unique: 0, 1, 2, ..."""

    def make(lengths: list[int]) -> Source:
        ends = np.cumsum([0, *lengths])
        documents = [[list(range(a, b))] for a, b in itertools.pairwise(ends)]
        return open_source(
            write_megatron(tmp_path_factory.mktemp("source") / "tokens", documents), "train"
        )

    return make
