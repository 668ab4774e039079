import json
import struct
from pathlib import Path

import numpy as np
import pytest

from dsv3_mtp.data.megatron import open_pair, token_dtype, write_index


def parse(prefix: Path) -> tuple[int, list[list[int]], list[int]]:
    """(dtype code, sequences, doc_idx) by the format's description, byte for byte."""
    raw, binary = Path(f"{prefix}.idx").read_bytes(), Path(f"{prefix}.bin").read_bytes()
    assert raw[:9] == b"MMIDIDX\x00\x00"
    version, code, count, borders = struct.unpack_from("<QBQQ", raw, 9)
    assert version == 1
    letter, width = {8: ("H", 2), 4: ("i", 4)}[code]
    sizes = struct.unpack_from(f"<{count}i", raw, 34)
    offsets = struct.unpack_from(f"<{count}q", raw, 34 + 4 * count)
    doc_idx = struct.unpack_from(f"<{borders}q", raw, 34 + 12 * count)
    assert len(raw) == 34 + 12 * count + 8 * borders
    sequences = [
        list(struct.unpack_from(f"<{n}{letter}", binary, at))
        for n, at in zip(sizes, offsets, strict=True)
    ]
    assert len(binary) == width * sum(sizes)
    return code, sequences, list(doc_idx)


@pytest.mark.parametrize(("vocab_size", "code"), [(65_535, 8), (65_536, 4)])
def test_what_we_write_is_megatron(tmp_path: Path, vocab_size: int, code: int):
    documents = [[1, 2, vocab_size - 1], [7], [5, 6]]
    dtype = token_dtype(vocab_size)
    np.concatenate(documents).astype(dtype).tofile(tmp_path / "x.bin")
    write_index(tmp_path / "x.idx", dtype, np.array([3, 1, 2], np.int32))
    assert parse(tmp_path / "x") == (code, documents, [0, 1, 2, 3])


def test_a_prepared_shard_is_megatron_with_the_end_of_text_in_every_document(pystdlib: Path):
    index = json.loads((pystdlib / "index.json").read_text())
    code, sequences, doc_idx = parse(pystdlib / "val-00000")
    assert code == 8
    assert all(
        sequence[-1] == index["eos_id"] and index["eos_id"] not in sequence[:-1]
        for sequence in sequences
    )
    assert doc_idx == list(range(index["splits"]["val"]["documents"] + 1))


@pytest.mark.parametrize("code", [1, 2, 3, 4, 5, 8])
def test_every_integer_dtype_is_read(megatron, code: int):
    tokens, lengths = open_pair(megatron([[[1, 2, 3]], [[100]]], code=code))
    assert tokens.tolist() == [1, 2, 3, 100]
    assert lengths.tolist() == [3, 1]


def test_sequences_are_grouped_into_documents_and_empty_documents_left_out(megatron):
    tokens, lengths = open_pair(megatron([[[1, 2], [3]], [], [[4]], [[]], [[5, 6], [7, 8]]]))
    assert tokens.tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert lengths.tolist() == [3, 1, 4]


def damaged(prefix: Path, suffix: str, at: int, content: bytes) -> Path:
    path = Path(f"{prefix}.{suffix}")
    raw = bytearray(path.read_bytes())
    raw[at : at + len(content)] = content
    path.write_bytes(raw)
    return prefix


def test_a_truncated_bin_is_named_with_both_sizes(megatron):
    prefix = megatron([[[1, 2, 3]]])
    Path(f"{prefix}.bin").write_bytes(b"\0" * 8)
    with pytest.raises(
        ValueError, match=r"tokens\.bin: 8 bytes, but tokens\.idx describes 12 bytes"
    ):
        open_pair(prefix)


@pytest.mark.parametrize(
    ("size", "message"), [(20, "20 bytes.* at least 34"), (60, "60 bytes.* take 62 bytes")]
)
def test_a_truncated_idx_is_named_with_both_sizes(megatron, size: int, message: str):
    prefix = megatron([[[1, 2, 3]]])
    index = Path(f"{prefix}.idx")
    index.write_bytes(index.read_bytes()[:size])
    with pytest.raises(ValueError, match=rf"tokens\.idx: {message}"):
        open_pair(prefix)


@pytest.mark.parametrize(
    ("at", "content", "message"),
    [
        (0, b"X", "starts with"),
        (9, b"\x02", "version 2"),
        (17, b"\x07", "dtype code 7"),
        (42, b"\x04", "back to back"),
        (34, b"\xff\xff\xff\xff", "back to back"),
        (58, b"\x01", "doc_idx"),
    ],
)
def test_a_damaged_idx_is_refused(megatron, at: int, content: bytes, message: str):
    prefix = megatron([[[1, 2, 3]], [[4]]])
    with pytest.raises(ValueError, match=message):
        open_pair(damaged(prefix, "idx", at, content))


def test_a_missing_half_and_an_empty_pair_are_refused(megatron):
    with pytest.raises(ValueError, match="holds no tokens"):
        open_pair(megatron([[[]]]))
    prefix = megatron([[[1]]], name="half")
    Path(f"{prefix}.bin").unlink()
    with pytest.raises(ValueError, match=r"half\.bin: no such file"):
        open_pair(prefix)
