"""The Megatron `.bin/.idx` pair: token ids, and the lengths of their sequences and documents.

    PREFIX.bin   token ids, back to back, nothing else
    PREFIX.idx   b"MMIDIDX\\0\\0" | u64 version = 1 | u8 dtype code | u64 S sequences
                 | u64 len(doc_idx) | S x i32 tokens per sequence | S x i64 byte offset
                 | doc_idx: i64 number of the first sequence of each document, then S

All numbers are little-endian. Our own shards have one sequence per document; foreign files may have
several.
"""

import os
import struct
from pathlib import Path

import numpy as np

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}  # 6 and 7 are floats


def token_dtype(vocab_size: int) -> np.dtype:
    """Megatron's narrowest dtype for ids below `vocab_size`: uint16 under 65,536, else int32."""
    return np.dtype("<u2") if vocab_size < 65_536 else np.dtype("<i4")


def write_index(path: Path, dtype: np.dtype, sizes: np.ndarray) -> None:
    """Write the `.idx` of documents with `sizes` tokens, one sequence each, and fsync it."""
    code = next(code for code, name in DTYPES.items() if np.dtype(name) == dtype)
    documents = len(sizes)
    offsets = np.zeros(documents, "<i8")
    np.cumsum(sizes[:-1] * np.int64(dtype.itemsize), out=offsets[1:])
    with open(path, "wb") as file:
        file.write(HEADER.pack(MAGIC, 1, code, documents, documents + 1))
        file.write(sizes.astype("<i4").tobytes())
        file.write(offsets.tobytes())
        file.write(np.arange(documents + 1, dtype="<i8").tobytes())
        file.flush()
        os.fsync(file.fileno())


def read_index(path: Path) -> tuple[np.dtype, np.ndarray]:
    """The token dtype of a `.idx` file, and the tokens per document (int64, no empty documents).
    Raises ValueError: it is no Megatron index, cut off, of floats, or contradicts itself.
    """
    raw = np.fromfile(path, np.uint8)
    if len(raw) < HEADER.size:
        raise ValueError(f"{path}: {len(raw)} bytes, a Megatron index has at least {HEADER.size}")
    magic, version, code, sequences, borders = HEADER.unpack(raw[: HEADER.size].tobytes())
    if magic != MAGIC or version != 1:
        text = f"starts with {magic!r} version {version}, a Megatron index with {MAGIC!r} version 1"
        raise ValueError(f"{path}: {text}")
    if code not in DTYPES:
        text = f"is no integer type; token ids have one of {sorted(DTYPES)}"
        raise ValueError(f"{path}: dtype code {code} {text}")
    expected = HEADER.size + 12 * sequences + 8 * borders
    if len(raw) != expected:
        raise ValueError(
            f"{path}: {len(raw)} bytes, but its header promises {sequences} sequences and "
            f"{borders} document borders, which take {expected} bytes; the file is truncated or "
            "damaged"
        )
    dtype = np.dtype(DTYPES[code])
    body = raw[HEADER.size :].tobytes()
    sizes = np.frombuffer(body, "<i4", sequences).astype(np.int64)
    offsets = np.frombuffer(body, "<i8", sequences, 4 * sequences)
    doc_idx = np.frombuffer(body, "<i8", borders, 12 * sequences)
    ends = np.concatenate([[0], np.cumsum(sizes)])  # (S + 1,) in tokens
    if (sizes < 0).any() or not np.array_equal(offsets, ends[:-1] * dtype.itemsize):
        text = "sequences do not lie back to back; merge them into one file first"
        raise ValueError(f"{path}: its {sequences} {text}")
    if borders < 1 or doc_idx[0] != 0 or doc_idx[-1] != sequences or (np.diff(doc_idx) < 0).any():
        text = f"does not run from 0 to the number of sequences, {sequences}"
        raise ValueError(f"{path}: doc_idx {text}")
    lengths = np.diff(ends[doc_idx])
    return dtype, lengths[lengths > 0]


def open_pair(prefix: Path | str) -> tuple[np.ndarray, np.ndarray]:
    """Memory-maps PREFIX.bin, reads PREFIX.idx: (tokens (N,), tokens per document (documents,)).
    Raises ValueError: a file is missing, the two disagree about N, or there are no tokens.
    """
    binary, index = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
    for path in (binary, index):
        if not path.is_file():
            what = "is no file" if path.exists() else "no such file"
            pair = "a Megatron data set is the pair PREFIX.bin and PREFIX.idx"
            raise ValueError(f"{path}: {what}; {pair}")
    dtype, lengths = read_index(index)
    expected, actual = int(lengths.sum()) * dtype.itemsize, binary.stat().st_size
    if actual != expected:
        raise ValueError(
            f"{binary}: {actual} bytes, but {index.name} describes {expected} bytes "
            f"({expected // dtype.itemsize} tokens of "
            f"{dtype.name}); one of the two is truncated or damaged"
        )
    if expected == 0:
        raise ValueError(f"{binary}: holds no tokens")
    return np.memmap(binary, dtype, "r"), lengths
