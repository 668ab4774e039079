"""User text, one document at a time: text files, JSON lines, parquet, saved Hugging Face data sets.

records.py reads the records of each file.
"""

import glob
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired, Protocol, runtime_checkable

from pydantic import with_config
from typing_extensions import TypedDict

from dsv3_mtp.data.chat import ChatTemplate, Piece, record_pieces
from dsv3_mtp.data.records import JSONL, TABLES, Unreadable, open_records
from dsv3_mtp.files.atomic import inside
from dsv3_mtp.files.checked import OPEN, read_json

VAL_BUCKETS = 1_000_000


@with_config(OPEN)
class DataFile(TypedDict):
    """One file of a saved data set."""

    filename: str


@with_config(OPEN)
class SavedDataset(TypedDict):
    """state.json of datasets.Dataset.save_to_disk."""

    _data_files: list[DataFile]
    _indices_data_files: NotRequired[list[DataFile] | None]


@dataclass(frozen=True, slots=True)
class Document:
    text: str
    sha256: bytes
    split: str
    file: int  # number of the input file
    record: int  # of the next record in this file: where to go on after this document
    done: int  # bytes of this file read so far, for the progress display
    pieces: tuple[Piece, ...] = ()  # of a record with answers (`--mask prompts`); else none


class Inputs(Protocol):
    """What `prepare` reads: numbered files of numbered documents."""

    @property
    def splits(self) -> tuple[str, ...]: ...  # names: train first
    @property
    def sizes(self) -> list[int]: ...  # bytes per file
    @property
    def fingerprint(self) -> str: ...  # changes when the files change
    def read(self, file: int = 0, record: int = 0) -> Iterator[Document]:
        """All documents from record `record` of file `file` on."""
        ...


@runtime_checkable
class Corpus(Inputs, Protocol):
    """Inputs that name themselves: `fingerprint` is the manifest hash, a function of the text."""

    @property
    def origin(self) -> dict[str, Any]: ...  # name of the corpus and the versions it depends on
    def listing(self) -> dict[str, Any]:
        """What manifest.json says of every file."""
        ...


@dataclass(frozen=True)
class Masking:
    """What records with answers are read with."""

    template: ChatTemplate | None
    specials: frozenset[str]


class FileInputs:
    """The documents of files, folders and globs; `val_fraction` of them, by content hash, are val.

    A text file is one document; each record of .jsonl[.gz|.zst], .parquet and a saved data set is
    one.
    """

    splits = ("train", "val")

    def __init__(
        self,
        patterns: list[str],
        *,
        text_key: str,
        val_fraction: float,
        out: Path,
        masking: Masking | None = None,
        val_by_position: bool = False,
        skip_unreadable: bool = False,
    ) -> None:
        """out: the folder that is being made, and is no input where a pattern covers it.
        masking: records are questions and answers. val_by_position: the end of every text file is
        val. skip_unreadable: `skipped` names what `read` has left out.

        Raises:
            ValueError: nothing matches; with `masking`, files that are no JSON lines; with
                `val_by_position`, files that hold records.
        """
        self.text_key, self.val_fraction, self.masking = text_key, val_fraction, masking
        own = {out.resolve(), out.with_name(out.name + ".partial").resolve()}
        files = _find_files(patterns)
        self.files = [path for path in files if own.isdisjoint(path.resolve().parents)]
        other = [str(path) for path in self.files if not path.name.endswith(JSONL)]
        if masking is not None and other:
            text = f"{', '.join(JSONL)}, no other files: {', '.join(other[:3])}"
            raise ValueError(f"--mask prompts reads {text}")
        self.skip_unreadable, self.skipped = skip_unreadable, dict[Path, str]()
        self.cut = 1 - val_fraction if val_by_position else None
        records = [str(path) for path in self.files if path.name.endswith((*JSONL, *TABLES))]
        if val_by_position and records:
            raise ValueError(
                f"--val-by-position splits text files; {records[0]} holds a document per record, "
                "of which --val-fraction chooses some"
            )
        found = [(path, path.stat()) for path in self.files]  # the files as they are now
        self.sizes = [stat.st_size for _, stat in found]
        stamps = "".join(f"{path} {stat.st_mtime_ns} {stat.st_size}\n" for path, stat in found)
        self.fingerprint = hashlib.sha256(stamps.encode()).hexdigest()

    def read(self, file: int = 0, record: int = 0) -> Iterator[Document]:
        """All documents from record `record` of input file `file` on."""
        for number in range(file, len(self.files)):
            try:
                yield from self._documents(number, record)
            except Unreadable as error:
                if not self.skip_unreadable:
                    raise
                self.skipped[self.files[number]] = str(error)
            record = 0

    def _documents(self, number: int, record: int) -> Iterator[Document]:
        path, key = self.files[number], self.text_key if self.masking is None else None
        for following, done, text, place in open_records(path, key, record, self.cut):
            pieces: tuple[Piece, ...] = ()
            if self.masking is not None:
                pieces = record_pieces(text, **vars(self.masking), place=place)
                text = "".join(piece.text for piece in pieces)
            where = f"{place}: {self.text_key!r}"
            if not isinstance(text, str):
                raise ValueError(f"{where} is {type(text).__name__}, must be a string")
            try:
                content = text.encode("utf-8")
            except UnicodeEncodeError as error:
                raise ValueError(f"{where} has a lone surrogate ({error.reason})") from None
            marks = json.dumps([[len(p.text), p.scored] for p in pieces]) if pieces else ""
            digest = hashlib.sha256(content + marks.encode()).digest()
            bucket = int.from_bytes(digest, "big") % VAL_BUCKETS
            val = bucket < self.val_fraction * VAL_BUCKETS if self.cut is None else following == 2
            split = "val" if val else "train"
            yield Document(text, digest, split, number, following, done, pieces)


def _find_files(patterns: list[str]) -> list[Path]:
    # a file that two patterns name, however they write it, is read once
    files: dict[Path, Path] = {}
    missing = []
    for pattern in patterns:
        path = Path(pattern)
        if (path / "state.json").is_file() and (path / "dataset_info.json").is_file():
            found = _saved_dataset(path)
        elif path.is_dir():
            found = _walk(path)
        else:
            found = sorted(p for p in map(Path, glob.glob(pattern, recursive=True)) if p.is_file())
            found = [path] if path.is_file() else found
        if not found or not pattern:  # Path("") is the working directory
            missing.append(f"{pattern or repr(pattern)}: no file is there or matches it")
            continue
        for file in found:
            files.setdefault(file.resolve(), file)
    if missing:
        raise ValueError("\n".join(missing))
    return list(files.values())


def _walk(folder: Path) -> list[Path]:
    """All files below `folder` except hidden ones and __pycache__, sorted by path."""
    if (folder / "dataset_dict.json").is_file():
        splits = ", ".join(sorted(str(p) for p in folder.iterdir() if p.is_dir()))
        text = f"a saved DatasetDict; give the folder of one of its splits: {splits}"
        raise ValueError(f"{folder}: {text}")

    def hidden(path: Path) -> bool:
        parts = path.relative_to(folder).parts
        return any(part.startswith(".") or part == "__pycache__" for part in parts)

    return [path for path in sorted(folder.rglob("*")) if path.is_file() and not hidden(path)]


def _saved_dataset(folder: Path) -> list[Path]:
    """The Arrow files of a folder written by datasets.Dataset.save_to_disk."""
    state = read_json(folder / "state.json", SavedDataset, "save the data set again")
    if state.get("_indices_data_files"):
        text = "was saved with an indices mapping; save it again with a recent `datasets`"
        raise ValueError(f"{folder}: {text}")
    files = [folder / entry["filename"] for entry in state["_data_files"]]
    for path in files:
        if path.parent != folder or path.suffix != ".arrow" or not inside(path, folder):
            raise ValueError(
                f"{folder}: state.json names {path.name}, which is no .arrow file in this folder; "
                "save the data set again"
            )
    if missing := ", ".join(path.name for path in files if not path.is_file()):
        raise ValueError(f"{folder}: state.json names files that are not there: {missing}")
    return files
