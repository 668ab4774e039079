"""Code outside the package, named in a config as `package.module:Class` and imported late.

The working directory is searched as well, after everything else: `examples.bag_head:BagHead` is
found from a clone, whatever the launcher has put first. Only a config that was named on the command
line may name code (`load_config(..., trust_code=False)` for a folder of unknown origin).
"""

import hashlib
import importlib
import os
import re
import sys
import traceback
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from dsv3_mtp.config.reader import ConfigError

_NAME = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
_imported: set[str] = set()  # the modules of all code that was found
SECTIONS = ("mtp", "data")  # whose keys and values may name code


def is_code(name: Any) -> bool:
    """`name` has the form package.module:Class."""
    return isinstance(name, str) and _NAME.fullmatch(name) is not None


def find(name: str) -> Any:
    """The object that package.module:Class names. Raises ValueError: it is not there, or its module
    cannot be imported; one sentence.
    """
    module, _, attribute = name.partition(":")
    if (here := os.getcwd()) not in sys.path:
        sys.path.append(here)
    try:
        found = getattr(importlib.import_module(module), attribute, None)
    except Exception as error:  # whatever a stranger's module raises
        what = f"{type(error).__name__}: {error}"
        raise ValueError(f"{module} cannot be imported from {here}: {what}") from error
    if found is None:
        raise ValueError(f"{sys.modules[module].__file__} has no {attribute}")
    _imported.add(module)
    return found


def subclass(name: str, base: type) -> type:
    """The subclass of `base` that package.module:Class names, with all methods that it owes.

    Raises:
        ValueError: as `find`; or it is another thing, or lacks a method.
    """
    found = find(name)
    if not (isinstance(found, type) and issubclass(found, base)):
        raise ValueError(f"{name} is no subclass of {base.__module__}.{base.__name__}")
    if lacking := sorted(getattr(found, "__abstractmethods__", ())):
        raise ValueError(f"{name} has no {', '.join(lacking)}; docs/extend.md says what it owes")
    return found


def place(error: BaseException) -> str | None:
    """Where in code that a config names an error was raised; None: not there."""
    files = {sys.modules[name].__file__ for name in _imported}
    frames = traceback.extract_tb(error.__traceback__)
    inside = [frame for frame in frames if frame.filename in files]
    return f"{inside[-1].filename}:{inside[-1].lineno}, {inside[-1].name}" if inside else None


def named(tree: Mapping[str, Any]) -> list[str]:
    """What code a config's tree names, in order, each once."""
    return list(dict.fromkeys(name for key in SECTIONS for name in _names(tree.get(key))))


def refuse(source: str, tree: Mapping[str, Any], trusted: Collection[str]) -> None:
    """Raises ConfigError where a tree names code that is not trusted. Nothing is imported."""
    if names := [name for name in named(tree) if name not in trusted]:
        text = f"names code outside the package, {', '.join(names)}, which is not imported"
        remedy = "if you know what it does, give --trust-code (trust_code=True)"
        raise ConfigError(source, [("file", f"{text}; {remedy}")])


def _names(tree: Any) -> Iterator[str]:
    if is_code(tree):
        yield tree
    elif isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _names(key)
            yield from _names(value)
    elif isinstance(tree, list | tuple):
        for item in tree:
            yield from _names(item)


def hashes(tree: Mapping[str, Any]) -> dict[str, str]:
    """SHA-256 of the source file of all code that a config's tree names."""
    found = {}
    for name in named(tree):
        source = sys.modules[find(name).__module__].__file__
        found[name] = hashlib.sha256(Path(source or "").read_bytes()).hexdigest()
    return found
