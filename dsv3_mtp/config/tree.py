"""From a YAML file, the files that it builds on, and `--set` overrides to one plain tree.

    document = read_document("configs/v3_small.yaml", ["mtp.mode=parallel"])
    document.tree["optim"]["lr"], document.origin("optim.lr")

A file with `base: OTHER.yaml` holds what differs from that file, whose path is relative to its own.
Mappings are merged key by key. All else is replaced: numbers, lists, an empty mapping, a mapping of
another `type`, and one that the caller calls a single value. Nothing here knows the keys of a run.
"""

import copy
import functools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from dsv3_mtp.config.reader import ConfigError, Problem, show

BASE = "base"
DEEPEST = 8  # files that may build on one another


@dataclass
class ConfigDocument:
    """A tree, the problems met so far, and which of `layers` each value was written in.

    layers: the files from the innermost base on, then each override as it was typed.
    whole: dotted keys of mappings that are one value.
    """

    layers: list[str] = field(default_factory=list)
    tree: dict[str, Any] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    origins: dict[str, int] = field(default_factory=dict)
    files: int = 0
    whole: frozenset[str] = frozenset()

    def layer(self, key: str) -> int | None:
        """Number of the layer that a dotted key, or the mapping it stands in, was written in."""
        while key:
            if key in self.origins:
                return self.origins[key]
            key = key[: max(key.rfind("."), key.rfind("["), 0)]
        return None

    def origin(self, key: str) -> str | None:
        """The base file that a dotted key was inherited from; None: it was not inherited."""
        layer = self.layer(key)
        return self.layers[layer] if layer is not None and layer < self.files - 1 else None

    def inherited(self, key: str, *, beside: str) -> bool:
        """The key comes from a base, and `beside`, of a later layer, may not have known of it."""
        mine, other = self.layer(key), self.layer(beside)
        return self.origin(key) is not None and other is not None and (mine or 0) < other

    def traced(self, problem: Problem) -> Problem:
        """The problem, with the base file that the wrong value stands in."""
        key, text = problem
        origin = self.origin(key)
        return (key, f"{text}, in {origin}" if origin else text)

    def merge(self, tree: dict[str, Any], layer: int) -> None:
        """What a file says, over what its base said."""
        self.tree = self._merged(self.tree, tree, "", layer)

    def _merged(self, old: Any, new: Any, key: str, layer: int) -> Any:
        both = isinstance(old, dict) and isinstance(new, dict) and (new or not key)
        if not both or key in self.whole or old.get("type") != new.get("type", old.get("type")):
            self._forget(key)
            self._trace(new, key, layer)
            return new
        merged = dict(old)
        for name, value in new.items():
            merged[name] = self._merged(old.get(name), value, f"{key}.{name}".lstrip("."), layer)
        return merged

    def _forget(self, key: str) -> None:
        for other in [one for one in self.origins if f"{one}.".startswith(f"{key}.")]:
            del self.origins[other]

    def _trace(self, value: Any, key: str, layer: int) -> None:
        self.origins[key] = layer
        for name, inner in value.items() if isinstance(value, dict) else ():
            self._trace(inner, f"{key}.{name}", layer)

    def override(self, text: str) -> None:
        """Applies one `a.b=value`; the value is YAML, mappings on the way are created."""
        key, equals, value_text = text.partition("=")
        label = f"--set {text}" if len(text) <= 74 else f"--set {text[:71]}..."
        problem, key = None, key.strip()
        if key == BASE:
            problem = "is for files: write a file with this base, or name another"
        elif not equals or not all(key.split(".")):
            problem = "must be KEY=VALUE, for example --set mtp.mode=parallel"
        if problem is not None:
            self.problems.append((label, problem))
            return
        try:
            value, problems = _parse(value_text)
        except yaml.YAMLError as error:
            problems = [(label, f"the value is {_yaml_problem(error)[1]}")]
        self.problems += problems
        if not problems:
            self.put(key, value, label)

    def put(self, key: str, value: Any, layer: str = "") -> None:
        """Sets one dotted key; mappings on the way are created. layer: what a problem of it is
        called; empty: its key.
        """
        self.layers.append(layer)
        if (problem := _put(self.tree, key.split("."), value)) is not None:
            self.problems.append((layer or key, problem))
            return
        self._forget(key)
        self.origins[key] = len(self.layers) - 1


def read_document(
    path: str | Path, sets: Iterable[str] = (), *, whole: Iterable[str] = ()
) -> ConfigDocument:
    """Reads a YAML file over the files that it builds on, and applies `a.b=value` overrides.

    whole: dotted keys of mappings that are one value, replaced and not merged.

    Raises ConfigError when there is no tree to look at: a file is missing, is invalid YAML or not a
        mapping, or the files build on one another in a circle.
    """
    chain = _chain(Path(path))
    layers = [str(file) for file, _, _ in chain]
    document = ConfigDocument(layers=layers, files=len(chain), whole=frozenset(whole))
    for layer, (file, tree, problems) in enumerate(chain):
        last = layer == len(chain) - 1
        document.problems += [(k, text if last else f"{text}, in {file}") for k, text in problems]
        document.merge(tree, layer)
    for override in sets:
        document.override(override)
    return document


def read_tree(path: str | Path, sets: Iterable[str] = ()) -> tuple[dict[str, Any], list[Problem]]:
    """Tree and problems of `read_document`."""
    document = read_document(path, sets)
    return document.tree, document.problems


def _chain(path: Path) -> list[tuple[Path, dict[str, Any], list[Problem]]]:
    """(file, its own tree without `base`, its problems) from the innermost base to `path`."""
    chain: list[tuple[Path, dict[str, Any], list[Problem]]] = []
    while True:
        tree, problems = _read(path, chain[0][0] if chain else None)
        base = tree.pop(BASE, None)
        chain.insert(0, (path, tree, problems))
        if base is None:
            return chain
        if not isinstance(base, str) or not base:
            text = f"must be the path of a YAML file, relative to this one (got {show(base)})"
            raise ConfigError(str(path), [(BASE, text)])
        names = [str(file) for file, _, _ in reversed(chain)]
        path = path.parent / Path(base).expanduser()
        if any(path.resolve() == file.resolve() for file, _, _ in chain):
            circle = " -> ".join([*names, str(path)])
            raise ConfigError(names[0], [(BASE, f"the files build on one another: {circle}")])
        if len(chain) == DEEPEST:
            text = f"at most {DEEPEST} files may build on one another: {' -> '.join(names)} -> ..."
            raise ConfigError(names[0], [(BASE, text)])


def _read(path: Path, wanted_by: Path | None) -> tuple[dict[str, Any], list[Problem]]:
    """The mapping of one file; `wanted_by` names it as its base."""
    source = str(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        if wanted_by is not None:
            problem = (BASE, f"{path} cannot be read: {reason}")
            raise ConfigError(str(wanted_by), [problem]) from None
        raise ConfigError(source, [("file", f"cannot be read: {reason}")]) from None
    try:
        tree, problems = _parse(text)
    except yaml.YAMLError as error:
        raise ConfigError(source, [_yaml_problem(error)]) from None
    if not isinstance(tree, dict):
        raise ConfigError(source, [("file", f"must hold a mapping of sections (got {show(tree)})")])
    return tree, problems


# Bounds that no config comes near: a few bytes of aliases can stand for more than memory holds.
LARGEST, MOST_VALUES, DEEPEST = 1_000_000, 100_000, 50


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 3e-4 and 14.8e12 as numbers (YAML 1.2), not as text (YAML 1.1)."""


class _Dumper(yaml.SafeDumper):
    """Mappings as blocks, lists on one line; quotes text that _Loader would read as numbers."""


_EXPONENT = re.compile(r"[-+]?(\d[\d_]*\.?[\d_]*|\.\d+)[eE][-+]?\d+$")
for _side in (_Loader, _Dumper):
    _side.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+.0123456789"))


def _number(loader: _Loader, node: yaml.ScalarNode) -> int | float:
    """No 010, which is 8 to YAML 1.1 and 10 to its readers, and no 1:30, which is 90 or 01:30."""
    text = "write the number in decimal, or put text in quotes"
    if len(node.value) > 4000:  # Python reads no longer ones
        text = f"a number of {len(node.value):,} digits"
    elif re.match(r"[-+]?0\d|.*:", node.value):
        text = f"{node.value} is octal or sexagesimal here; {text}"
    else:
        integer = node.tag.endswith(":int")
        return (loader.construct_yaml_int if integer else loader.construct_yaml_float)(node)
    raise yaml.constructor.ConstructorError(None, None, text, node.start_mark)


for _tag in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_tag}", _number)
_Dumper.add_representer(
    list, lambda to, items: to.represent_sequence("tag:yaml.org,2002:seq", items, True)
)


def dump_tree(tree: Any) -> str:
    """YAML text that read_tree reads back equal."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, width=110)


def _parse(text: str) -> tuple[Any, list[Problem]]:
    value, problems = _read_once(text)
    return copy.deepcopy(value), list(problems)


@functools.lru_cache(maxsize=64)  # every arm of a study reads the same files again
def _read_once(text: str) -> tuple[Any, tuple[Problem, ...]]:
    if len(text) > LARGEST:
        raise yaml.YAMLError(f"{len(text):,} characters, more than {LARGEST:,}")
    try:
        _require_shallow(text)
        node = (loader := _Loader(text)).get_single_node()
        if node is None:
            return None, ()
        if (count := _values(node, {}, 0)) > MOST_VALUES:
            text = f"its aliases stand for {count:,} values, more than {MOST_VALUES:,}"
            raise yaml.YAMLError(text)
        problems = tuple(_duplicates(node, ""))  # before merge keys (<<) are written out
        return loader.construct_document(node), problems
    except RecursionError:
        raise yaml.YAMLError(f"nested deeper than {DEEPEST} levels") from None
    except ValueError as error:  # a date that is none, say
        raise yaml.YAMLError(f"{error}; put quotes around a value that is text") from None


def _require_shallow(text: str) -> None:
    """Raises RecursionError where brackets nest so deep that the scanner would take seconds."""
    depth = 0
    for bracket in re.findall(r"[\[\]{}]", text):
        depth += 1 if bracket in "[{" else -1
        if depth > 4 * DEEPEST:  # no text in quotes has so many that are not closed
            raise RecursionError


def _values(node: yaml.Node, counted: dict[int, int], depth: int) -> int:
    """How many values a node holds, aliases written out. counted: by node, 0 while in progress."""
    if depth > DEEPEST:
        raise RecursionError
    if id(node) not in counted:
        counted[id(node)] = 0
        inner = node.value if isinstance(node, yaml.CollectionNode) else []
        nodes = [n for item in inner for n in (item if isinstance(item, tuple) else (item,))]
        counted[id(node)] = 1 + sum(_values(n, counted, depth + 1) for n in nodes)
    elif not counted[id(node)]:
        raise yaml.YAMLError("an anchor contains itself")
    return counted[id(node)]


def _duplicates(node: yaml.Node, path: str) -> Iterator[Problem]:
    if isinstance(node, yaml.MappingNode):
        first_line: dict[str, int] = {}
        for key_node, value_node in node.value:
            key = f"{path}.{key_node.value}".lstrip(".")
            line = key_node.start_mark.line + 1
            if key in first_line:
                yield key, f"given twice, on lines {first_line[key]} and {line}; keep one"
            first_line.setdefault(key, line)
            yield from _duplicates(value_node, key)
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield from _duplicates(item, f"{path}[{index}]")


def _yaml_problem(error: yaml.YAMLError) -> Problem:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"line {mark.line + 1}, column {mark.column + 1}", f"invalid YAML: {error.problem}"
    return "file", f"invalid YAML: {' '.join(str(error).split())}"


def _put(tree: dict[str, Any], keys: list[str], value: Any) -> str | None:
    """Sets the value in place; mappings on the way are created. Returns what is in the way."""
    node = tree
    for depth, key in enumerate(keys[:-1], start=1):
        if node.get(key) is None:
            node[key] = {}
        if not isinstance(node[key], dict):
            parent = ".".join(keys[:depth])
            return f"{parent} is {show(node[key])}, not a mapping; set {parent} as a whole"
        # its own: a YAML alias may stand for the same mapping elsewhere
        node[key] = dict(node[key])
        node = node[key]
    node[keys[-1]] = value
    return None
