"""sitelib, a corpus of some hundred megabytes that every environment brings along: the *.py files
of its site-packages and of the standard library.

Nothing is downloaded or vendored. The text depends on what is installed, so `manifest_hash` says
which corpus it was: numbers of two corpora are not compared. Three splits, all decided by hashes:

    train   files of the training packages
    val     `iid`: other files of the training packages
    shift   whole packages of which no file is in the others

A package is a distribution with its version (one wheel: torch and torchgen), the standard library
is one, named python, and always a training package. A file that occurs twice is taken once, from a
training package if it is in one.
"""

import hashlib
import importlib.metadata
import platform
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsv3_mtp.data.documents import Document
from dsv3_mtp.data.stdlib import source_files

VAL_PER_MILLE = 20  # of the files of training packages
SHIFT_PER_MILLE = 100  # of the packages
MIN_FILE_BYTES = 64
MIN_BYTES = 20_000_000  # torch alone has twice that
# an installed copy of this project, and installers: `pip freeze` leaves these out of a lock file,
# and so their versions change from one day to the next
LEFT_OUT = {"dsv3-mtp", "pip", "setuptools", "wheel"}
STANDARD_LIBRARY = "python"
SKIPPED, SITE = ("__pycache__",), ("site-packages", "dist-packages")  # folders


@dataclass(frozen=True)
class SourceFile:
    """One file of the corpus."""

    package: str  # distribution, in the normal form of its name
    name: str  # path below site-packages or the standard library, with slashes
    path: Path
    sha256: str
    size: int  # bytes
    split: str


@dataclass(frozen=True)
class SitelibInputs:
    """The files as documents, in the order of `files`: by package, then by name."""

    files: tuple[SourceFile, ...]
    versions: dict[str, str]  # of every package that has a file here

    splits = ("train", "val", "shift")

    @property
    def sizes(self) -> list[int]:
        """Bytes per file."""
        return [file.size for file in self.files]

    @property
    def fingerprint(self) -> str:
        """The manifest hash: sha256 over package, name, content hash and split of every file."""
        lines = (f"{f.package} {f.name} {f.sha256} {f.split}\n" for f in self.files)
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def read(self, file: int = 0, record: int = 0) -> Iterator[Document]:
        """All documents from record `record` (0 or 1) of file `file` on. Raises ValueError: a file
        is no longer what it was when the corpus was listed.
        """
        for number in range(file + record, len(self.files)):
            listed = self.files[number]
            content = listed.path.read_bytes()
            digest = hashlib.sha256(content)
            if digest.hexdigest() != listed.sha256:
                raise ValueError(f"{listed.path}: changed while it was read; prepare it again")
            text = content.decode("utf-8")
            yield Document(text, digest.digest(), listed.split, number, 1, listed.size)

    @property
    def origin(self) -> dict[str, str]:
        """What the text depends on; manifest.json has the packages and their versions."""
        return {"corpus": "sitelib", "python": platform.python_version()}

    def listing(self) -> dict[str, Any]:
        """What manifest.json says of every package and of every file."""
        packages: dict[str, dict[str, Any]] = {}
        for file in self.files:
            version, shift = self.versions[file.package], file.split == "shift"
            empty = {"version": version, "shift": shift, "files": 0, "bytes": 0}
            entry = packages.setdefault(file.package, empty)
            entry["files"] += 1
            entry["bytes"] += file.size
        files = [
            {"package": f.package, "path": f.name, "sha256": f.sha256, "split": f.split}
            for f in self.files
        ]
        return {"packages": packages, "files": files}


def sitelib_inputs(site: Path | None = None, library: Path | None = None) -> SitelibInputs:
    """List the site-packages and the standard library of the running interpreter, or those given.
    Raises ValueError: there is too little text.
    """
    site = Path(sysconfig.get_path("purelib")) if site is None else site
    library = Path(sysconfig.get_path("stdlib")) if library is None else library
    owners, versions = _distributions(site)
    versions[STANDARD_LIBRARY] = platform.python_version()
    own = source_files(library, SKIPPED + SITE)
    found = [(STANDARD_LIBRARY, name, library / name) for name in own]
    for name in source_files(site, SKIPPED):
        top = name.partition("/")[0].removesuffix(".py")
        package = owners.get(top, top)
        if package not in LEFT_OUT:
            found.append((package, name, site / name))
    # Training packages first, so that of two equal files theirs is kept.
    found.sort(key=lambda item: (is_shift(item[0]), item[0], item[1]))
    files = _distinct(found)
    total = sum(file.size for file in files)
    if total < MIN_BYTES:
        raise ValueError(
            f"{site} and {library}: have {total / 1e6:.1f} MB of Python files, sitelib needs at "
            f"least {MIN_BYTES / 1e6:.0f}. Install this project's dependencies into this "
            "environment, use pystdlib, or prepare other text with dsv3 prepare --input"
        )
    names = sorted({file.package for file in files})
    return SitelibInputs(tuple(files), {name: versions.get(name, "unknown") for name in names})


def is_shift(package: str) -> bool:
    """The package is held out whole: decided by its name, whatever its version."""
    return package != STANDARD_LIBRARY and _bucket(f"shift {package}") < SHIFT_PER_MILLE


def _distinct(found: list[tuple[str, str, Path]]) -> list[SourceFile]:
    """The files whose text has not come before, in this order, each with its split."""
    files, seen = [], set()
    for package, name, path in found:
        content = path.read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        if len(content) < MIN_FILE_BYTES or digest in seen or not _is_utf8(content):
            continue
        seen.add(digest)
        # By content: a file that moves between packages or versions keeps its split.
        held_out = _bucket(f"val {digest}") < VAL_PER_MILLE
        split = "shift" if is_shift(package) else "val" if held_out else "train"
        files.append(SourceFile(package, name, path, digest, len(content), split))
    return files


def _bucket(text: str) -> int:
    return int(hashlib.sha256(text.encode()).hexdigest(), 16) % 1000


def _is_utf8(content: bytes) -> bool:
    try:
        content.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _distributions(site: Path) -> tuple[dict[str, str], dict[str, str]]:
    """The distribution of every top-level module in `site`, and the version of each."""
    owners: dict[str, str] = {}
    versions: dict[str, str] = {}
    for distribution in importlib.metadata.distributions(path=[str(site)]):
        name = distribution.metadata["Name"]
        if name is None:  # left behind by an interrupted installation
            continue
        normal = re.sub(r"[-_.]+", "-", name).lower()
        versions[normal] = distribution.version
        for file in distribution.files or ():
            if file.suffix == ".py" and file.parts[0] != "..":
                # Of a namespace of several distributions the first by name owns all.
                top = file.parts[0].removesuffix(".py")
                owners[top] = min(owners.get(top, normal), normal)
    return owners, versions
