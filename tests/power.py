"""What a disk holds after the power has failed, at each point of a piece of work.

A file's content is on the disk as it was at its last fsync, and a folder's list of names as it was
at the folder's last fsync. A disk may have written names earlier than it had to: the two extremes
are looked at, no name written that need not be, and all names written but no content.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

CALLS = ("fsync", "replace", "rename", "unlink", "mkdir", "rmdir")


class Disk:
    """Records what is synced below `root`. Everything that is there at first is on the disk."""

    def __init__(self, root: Path):
        self.root = root
        self.content: dict[int, bytes] = {}  # by inode
        self.names: dict[int, dict[str, int]] = {}  # of a folder: name -> inode
        self._held: list[int] = []  # so that no inode's number is given to another file
        for path in [root, *root.rglob("*")]:
            self.synced(path)

    def synced(self, path: Path) -> None:
        inode = path.stat().st_ino
        if inode not in self.content and inode not in self.names:
            self._held.append(os.open(path, os.O_RDONLY))
        if path.is_dir():
            self.names[inode] = {p.name: p.stat().st_ino for p in path.iterdir()}
        else:
            self.content[inode] = path.read_bytes()

    def after_crash(self, out: Path, *, names_written: bool) -> None:
        """Makes `out` what is on the disk when the power fails now."""
        self._restore(self.root.stat().st_ino, self.root if names_written else None, out)

    def _restore(self, inode: int, now: Path | None, out: Path) -> None:
        out.mkdir()
        if now is None:
            found = {name: (one, None) for name, one in self.names.get(inode, {}).items()}
        else:
            found = {path.name: (path.stat().st_ino, path) for path in now.iterdir()}
        for name, (one, path) in found.items():
            if one in self.names or (path is not None and path.is_dir()):
                self._restore(one, path, out / name)
            else:
                (out / name).write_bytes(self.content.get(one, b""))

    def close(self) -> None:
        for descriptor in self._held:
            os.close(descriptor)


@contextmanager
def failing(root: Path, at_each_point: Callable[[Path], None], scratch: Path) -> Iterator[None]:
    """Lets the power fail after each call that changes what is on the disk, in both extremes, and
    hands over what is left of `root`.
    """
    disk, real = Disk(root), {name: getattr(os, name) for name in CALLS}
    points = inside = 0

    def fail() -> None:
        nonlocal points, inside
        if inside:
            return
        inside = 1
        for names_written in (False, True):
            left = scratch / f"{points}-{names_written}"
            disk.after_crash(left, names_written=names_written)
            at_each_point(left)
        points, inside = points + 1, 0

    def fsync(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if path.exists() and path.is_relative_to(root) and not inside:
            disk.synced(path)
            fail()

    def then_fail(call: Callable) -> Callable:
        def wrapped(*args, **kwargs):
            result = call(*args, **kwargs)
            fail()
            return result

        return wrapped

    with pytest.MonkeyPatch.context() as patch:
        for name, call in real.items():
            patch.setattr(os, name, fsync if name == "fsync" else then_fail(call))
        yield
    fail()
    disk.close()
    assert points > 3
