"""Files that are written wholly or not at all, also when the process is killed or the power fails,
by one process at a time. No torch.
"""

import fcntl
import json
import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

LEFT = re.compile(r"\..+\.\d+\.tmp")  # as `replacing` names them


@contextmanager
def naming_file(path: Path) -> Iterator[None]:
    """Adds the path to an OSError raised inside where it has none, as that of a full disk."""
    try:
        yield
    except OSError as error:
        if error.errno is not None:  # without one the name would not be printed
            error.filename = error.filename or str(path)
        raise


def sync(path: Path) -> None:
    """Waits until a file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with suppress(OSError) if path.is_dir() else nullcontext():  # some file systems cannot
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """`sync` of a folder and of everything in it."""
    for path in [*folder.rglob("*"), folder]:
        sync(path)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`, which it replaces in one step; both are synced."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with naming_file(path):
            yield temporary
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
            sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def sweep(folder: Path, *, older_than: float = 0.0) -> None:
    """Deletes the temporary files that killed processes left in a folder.

    older_than: seconds; 0 where this process holds the folder's lock, so that no other writes
    there.
    """
    for path in folder.glob(".*.tmp"):
        if LEFT.fullmatch(path.name) and path.is_file():
            with suppress(OSError):  # another process swept it just now
                if time.time() - path.stat().st_mtime >= older_than:
                    path.unlink()


def inside(path: Path, folder: Path) -> bool:
    """The file lies in the folder, or where a link in it leads within the same download.

    The cache of the Hugging Face Hub has snapshots of links to the blobs beside them.
    """
    try:
        real, home = path.resolve(), folder.resolve()
    except RuntimeError:  # a link to itself
        return False
    cached = home.parent.name == "snapshots" and home.parents[1].name.startswith("models--")
    return real.is_relative_to(home) or (cached and real.parent == home.parents[1] / "blobs")


def folder_for(path: Path) -> None:
    """Makes the folder that an option names, and those it stands in.

    Raises:
        ValueError: a file is in the way, or nothing may be written there.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"{path}: no folder can be made there ({error.strerror}: {error.filename}); choose "
            "another"
        ) from None


def lock(path: Path, busy: str, *, wait: bool = False) -> int:
    """Holds the file `path` for this process until it ends, or until the descriptor is closed.

    wait: for another holder, after printing `busy`.

    Raises:
        ValueError: `busy`: another process holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if not wait:
            os.close(descriptor)
            raise ValueError(busy) from None
        print(busy, file=sys.stderr, flush=True)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    return descriptor


def write_text(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1) + "\n")
