"""pystdlib, the corpus that every Python brings along: the *.py files of its own standard library.

Nothing is vendored, so the text differs between Python versions; `manifest_hash` says which one it
was.
"""

import hashlib
import os
import platform
import sysconfig
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsv3_mtp.data.documents import Document

EXCLUDED_FOLDERS = frozenset(
    ["test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "encodings"]
    + ["pydoc_data", "idlelib", "lib2to3", "distutils", "tkinter", "turtledemo", "ensurepip"]
    + ["msilib"]
)
MIN_FILE_BYTES = 64
MIN_FILES = 100  # a complete standard library has 360 to 410
VAL_PER_MILLE = 100


@dataclass(frozen=True)
class StdlibInputs:
    """The standard library as documents, split by the hash of the path."""

    texts: tuple[tuple[str, str], ...]  # (path relative to the library, text), sorted by path
    # (path, sha256, "train" | "val" | "skipped"), sorted
    manifest: tuple[tuple[str, str, str], ...]
    fingerprint: str  # the manifest hash: sha256 over the sorted (path, sha256, split)
    sizes: list[int]

    splits = ("train", "val")

    @property
    def origin(self) -> dict[str, str]:
        """What the text depends on."""
        return {"corpus": "pystdlib", "python": platform.python_version()}

    def listing(self) -> dict[str, Any]:
        """What manifest.json says of every file."""
        keys = ("path", "sha256", "split")
        return {"files": [dict(zip(keys, entry, strict=True)) for entry in self.manifest]}

    def read(self, file: int = 0, record: int = 0) -> Iterator[Document]:
        """All documents from record `record` (0 or 1) of file `file` on."""
        for number in range(file + record, len(self.texts)):
            path, text = self.texts[number]
            digest = hashlib.sha256(text.encode()).digest()
            yield Document(text, digest, path_split(path), number, 1, self.sizes[number])


def stdlib_inputs(root: Path | None = None) -> StdlibInputs:
    """Read the standard library of the running interpreter, or the one in `root`.

    Raises ValueError when its sources are not installed.
    """
    root = Path(sysconfig.get_path("stdlib")) if root is None else root
    texts, manifest = [], []
    for name in source_files(root, EXCLUDED_FOLDERS):
        content = (root / name).read_bytes()
        if len(content) < MIN_FILE_BYTES:
            continue
        split = path_split(name)
        try:
            texts.append((name, content.decode("utf-8")))
        except UnicodeDecodeError:
            split = "skipped"
        manifest.append((name, hashlib.sha256(content).hexdigest(), split))
    if len(texts) < MIN_FILES:
        raise ValueError(
            f"{root}: has {len(texts)} standard library .py files, at least {MIN_FILES} are "
            "needed: this Python comes without its sources. Install a full one (Debian: apt "
            "install libpython3-stdlib; or uv python install), or prepare other text with dsv3 "
            "prepare --input"
        )
    listing = "".join(f"{name} {sha} {split}\n" for name, sha, split in manifest)
    digest = hashlib.sha256(listing.encode()).hexdigest()
    sizes = [len(text.encode()) for _, text in texts]
    return StdlibInputs(tuple(texts), tuple(manifest), digest, sizes)


def path_split(path: str) -> str:
    """The split of a standard-library file: a tenth is val."""
    bucket = int(hashlib.sha256(path.encode()).hexdigest(), 16) % 1000
    return "val" if bucket < VAL_PER_MILLE else "train"


def source_files(root: Path, skipped: Collection[str]) -> list[str]:
    """Paths of the .py files below `root`, relative to it, sorted. skipped: folders."""
    found = []
    for folder, folders, files in os.walk(root):  # walks into what is left in `folders`
        folders[:] = [f for f in folders if f not in skipped and not f.startswith("config-")]
        for file in files:
            path = Path(folder, file)
            if file.endswith(".py") and not file.startswith("_sysconfigdata") and path.is_file():
                found.append(path.relative_to(root).as_posix())
    return sorted(found)
