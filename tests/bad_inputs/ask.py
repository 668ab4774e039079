"""A wrong input, the command that meets it, and what the command answers.

A case is a line: what is wrong, the command, the damage done to a copy of the world (world.py),
and a regular expression for what stderr says.
"""

import json
import os
import re
import resource
import shlex
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from tests.conftest import contents

SECONDS = 20  # of CPU time, in which every wrong input is answered, however slow the machine
MOST_LINES, MOST_LETTERS = 24, 2500

Damage = Callable[[Path], None]


class Case(NamedTuple):
    """code 0: it is no error, and stderr or stdout says what was wrong."""

    name: str
    command: str
    said: str
    damage: Damage | None = None
    code: int = 2
    slow: bool = False
    env: dict[str, str] = {}


class Answer(NamedTuple):
    code: int  # negative: the signal that ended it
    out: str
    err: str


def ask(command: str, folder: Path, env: dict[str, str] | None = None) -> Answer:
    """`dsv3 COMMAND` in a process of its own, forked from this one, which has torch already."""
    streams = [folder.with_name(f"{folder.name}.{name}") for name in ("out", "err")]
    sys.stdout.flush(), sys.stderr.flush()
    if not (child := os.fork()):
        _child(command, folder, env or {}, streams)
    _, status = os.waitpid(child, 0)
    out, err = (path.read_text(errors="replace") for path in streams)
    return Answer(os.waitstatus_to_exitcode(status), out, err)


def _child(command: str, folder: Path, env: dict[str, str], streams: list[Path]) -> None:
    code: Any = 1
    try:
        os.environ.update(env)
        os.chdir(folder)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for number, path in enumerate(streams, start=1):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        sys.stdin, sys.stdout, sys.stderr = (
            open(number, mode, encoding="utf-8", closefd=False)  # noqa: SIM115
            for number, mode in ((0, "r"), (1, "w"), (2, "w"))
        )
        signal.signal(signal.SIGINT, signal.default_int_handler)
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
        from dsv3_mtp.cli.command import main

        code = main(shlex.split(command))
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(code)


def faults(case: Case, world: Path, folder: Path) -> list[str]:
    """What is wrong with the answer to a case; none: it is as it should be."""
    shutil.copytree(world, folder, symlinks=True)
    if case.damage is not None:
        case.damage(folder)
    before = contents(folder)
    answer = ask(case.command, folder, case.env)
    found = []
    said = answer.err if case.code else answer.err + answer.out
    if answer.code != case.code:
        found.append(f"exit code {answer.code}, not {case.code}")
    if "Traceback" in said:
        found.append("a traceback")
    if "[Errno" in said:
        found.append("an error of the operating system as it came")
    if not re.search(case.said, said):
        found.append(f"does not say {case.said!r}")
    if case.code and (len(said.splitlines()) > MOST_LINES or len(said) > MOST_LETTERS):
        found.append(f"{len(said.splitlines())} lines, {len(said)} letters")
    after = contents(folder)
    changed = {name for name in before | after if before.get(name) != after.get(name)}
    if case.code and (wrote := [name for name in changed if after.get(name) != b""]):
        found.append(f"wrote {sorted(wrote)}")  # an empty lock does no harm
    return [*found, said[-3000:]] if found else []


def put(name: str, content: str | bytes) -> Damage:
    """Replaces a file, or makes one."""

    def damage(folder: Path) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)

    return damage


def edit(name: str, change: Callable[[Any], Any]) -> Damage:
    """Changes a JSON file: `change` returns the new content, or None after changing it in place."""

    def damage(folder: Path) -> None:
        path = folder / name
        content = json.loads(path.read_text())
        changed = change(content)
        path.write_text(json.dumps(content if changed is None else changed))

    return damage


def given(name: str, **values: Any) -> Damage:
    """Sets keys of a JSON file; a key a__b is b in a."""

    def change(content: Any) -> None:
        for key, value in values.items():
            *parents, last = key.split("__")
            inner = content
            for parent in parents:
                inner = inner[int(parent) if isinstance(inner, list) else parent]
            inner[int(last) if isinstance(inner, list) else last] = value

    return edit(name, change)


def without(name: str, key: str) -> Damage:
    """Takes a key out of a JSON file."""
    return edit(name, lambda content: {k: v for k, v in content.items() if k != key})


def raw(name: str, change: Callable[[bytes], bytes]) -> Damage:
    """Changes the bytes of a file."""

    def damage(folder: Path) -> None:
        (folder / name).write_bytes(change((folder / name).read_bytes()))

    return damage


def cut(name: str, keep: int) -> Damage:
    """Leaves the first bytes of a file; negative: all but the last."""
    return raw(name, lambda content: content[:keep])


def gone(name: str) -> Damage:
    def damage(folder: Path) -> None:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return damage


def link(name: str, target: str) -> Damage:
    """A symbolic link in the place of a file."""

    def damage(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)

    return damage


def both(*damages: Damage) -> Damage:
    def damage(folder: Path) -> None:
        for one in damages:
            one(folder)

    return damage
