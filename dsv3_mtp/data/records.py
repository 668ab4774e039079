"""The records of one file: text files, JSON lines, parquet, the Arrow files of a saved data set.

Every reader can start at any record and names file and record in its errors, which are all
ValueError.
"""

import codecs
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

JSONL = (".jsonl", ".jsonl.gz", ".jsonl.zst")
TABLES = (".parquet", ".arrow")


class Unreadable(ValueError):
    """A file that is no UTF-8 text, or cannot be opened."""


# Number of the next record, bytes read, text (not checked yet), where it stands.
TextRecord = tuple[int, int, Any, str]


def open_records(
    path: Path, key: str | None, start: int, cut: float | None
) -> Iterator[TextRecord]:
    """key: of the text in a record; None: the whole record, of JSON lines. cut: where to divide a
    text file in two, as a share of its characters; None: nowhere.
    """
    name = path.name
    if name.endswith(JSONL):
        return jsonl_records(path, key, start)
    assert key is not None
    if name.endswith(TABLES):
        return _table_records(path, key, start)
    return _text_records(path, start, cut)


def _text_records(path: Path, start: int, cut: float | None) -> Iterator[TextRecord]:
    """The whole file; or what lies before and behind the first line end from `cut` on."""
    if start == (1 if cut is None else 2):
        return
    try:
        content = path.read_bytes().removeprefix(codecs.BOM_UTF8)  # how editors mark UTF-8: no text
        text = content.decode("utf-8")
    except OSError as error:
        raise Unreadable(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise Unreadable(
            f"{path}, line {line}: byte 0x{content[error.start]:02x} is not UTF-8; convert the "
            f"file, leave it out with a glob such as '{path.parent}/**/*.txt', or leave out all "
            "such files with --skip-unreadable"
        ) from None
    if cut is None:
        yield 1, len(content), text, str(path)
        return
    at = int(cut * len(text))
    at = max(text.find("\n", at) + 1, at)  # at the cut itself where no line ends behind it
    for number, part in enumerate((text[:at], text[at:]), start=1):
        if number > start:
            yield number, len(content) * number // 2, part, str(path)


def jsonl_records(path: Path, key: str | None, start: int) -> Iterator[TextRecord]:
    with open(path, "rb") as raw:
        number = 0
        try:
            for number, line in enumerate(_decompressed(raw, path.suffix), 1):
                if number > start and not line.isspace():
                    place = f"{path}, line {number}"
                    yield number, raw.tell(), _json_text(line, key, place), place
        except (OSError, EOFError, zlib.error) as error:  # from the decompressor
            raise ValueError(f"{path}, after line {number}: cannot be read ({error})") from None


def _decompressed(raw: Any, suffix: str) -> Any:
    if suffix == ".gz":
        return gzip.GzipFile(fileobj=raw)
    if suffix == ".zst":
        import pyarrow

        stream = pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, "r"), "zstd")
        return io.BufferedReader(stream, 1 << 20)
    return raw


def _json_text(line: bytes, key: str | None, place: str) -> Any:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:  # JSON or UTF-8; nested without end
        raise ValueError(f"{place}: not valid JSON ({error})") from None
    if key is None:
        return record
    if not isinstance(record, dict):
        kind = type(record).__name__
        raise ValueError(f"{place}: is a JSON {kind}, must be an object with the key {key!r}")
    if key not in record:
        text = f"has no key {key!r}, only {sorted(record)}; name it with --text-key"
        raise ValueError(f"{place}: {text}")
    return record[key]


def _table_records(path: Path, key: str, start: int) -> Iterator[TextRecord]:
    """Rows of a parquet file, or of an Arrow file as `datasets` saves them (IPC stream format)."""
    import pyarrow

    size, row, total = path.stat().st_size, 0, 0
    try:
        if path.suffix == ".parquet":
            import pyarrow.parquet

            table = pyarrow.parquet.ParquetFile(path)
            total, names = table.metadata.num_rows, table.schema_arrow.names
            batches = table.iter_batches(1024, columns=[key]) if key in names else iter(())
        else:
            reader = pyarrow.ipc.open_stream(pyarrow.memory_map(str(path)))
            names, batches = reader.schema.names, iter(reader)
        if key not in names:
            text = f"has no column {key!r}, only {sorted(names)}; name it with --text-key"
            raise ValueError(f"{path}: {text}")
        for batch in batches:
            if row + batch.num_rows > start:
                for offset, text in enumerate(batch.column(key).to_pylist()):
                    following = row + offset + 1
                    if following > start:
                        done = size * following // max(total, following)
                        yield following, done, text, f"{path}, row {following}"
            row += batch.num_rows
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}, after row {row}: cannot be read ({error})") from None
