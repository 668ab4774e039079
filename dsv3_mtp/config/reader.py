"""From a YAML file and `--set` overrides to a plain tree, and from a faulty tree to one readable
report.

Nothing here knows the keys of a run; run.py and model.py do. The report lists every problem at
once:

    configs/v3_tiny.yaml: 2 problems
      mtp.num_nextn_predict_layer: unknown key; did you mean 'mtp.num_nextn_predict_layers'?
      train.micro_batch_size: must be >= 1 (got 0)
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

Problem = tuple[str, str]  # (dotted key, what is wrong with it and what to do)


class ConfigError(ValueError):
    """A configuration that cannot be used; `str(error)` is the whole report, `error.problems` its
    lines.
    """

    def __init__(self, source: str, problems: Sequence[Problem]) -> None:
        count = f"{len(problems)} problem" + "s" * (len(problems) != 1)
        super().__init__(
            "\n".join([f"{source}: {count}", *(f"  {key}: {text}" for key, text in problems)])
        )
        self.problems = tuple(problems)


class KeyProblems(ValueError):
    """Raised by a section's validator for rules between its keys; the keys are relative to the
    section.
    """

    def __init__(self, problems: Sequence[Problem]) -> None:
        super().__init__("; ".join(f"{key}: {text}" for key, text in problems))
        self.problems = tuple(problems)


# --- reading ------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 3e-4 and 14.8e12 as numbers (YAML 1.2), where PyYAML (YAML 1.1) reads
    strings.
    """


class _Dumper(yaml.SafeDumper):
    """Mappings as blocks, lists on one line; quotes the strings that _Loader would read as
    numbers.
    """


_EXPONENT = re.compile(r"[-+]?(\d[\d_]*\.?[\d_]*|\.\d+)[eE][-+]?\d+$")
for _side in (_Loader, _Dumper):
    _side.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+.0123456789"))


def _number(loader: _Loader, node: yaml.ScalarNode) -> int | float:
    """No 010, which is 8 to YAML 1.1 and 10 to its readers, and no 1:30, which is 90 or 01:30."""
    if re.match(r"[-+]?0\d|.*:", node.value):
        text = (
            f"{node.value} is octal or sexagesimal here; "
            "write the number in decimal, or put text in quotes"
        )
        raise yaml.constructor.ConstructorError(None, None, text, node.start_mark)
    construct = (
        loader.construct_yaml_int if node.tag.endswith(":int") else loader.construct_yaml_float
    )
    return construct(node)


for _tag in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_tag}", _number)
_Dumper.add_representer(
    list, lambda to, items: to.represent_sequence("tag:yaml.org,2002:seq", items, True)
)


def dump_tree(tree: Any) -> str:
    """YAML text that read_tree reads back equal."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, width=110)


def read_tree(path: str | Path, sets: Iterable[str] = ()) -> tuple[dict[str, Any], list[Problem]]:
    """Reads a YAML file and applies `a.b=value` overrides; returns the tree and the problems met so
    far.

    Raises ConfigError when there is no tree to look at: missing file, invalid YAML, or not a
        mapping.
    """
    source = str(path)
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(source, [("file", f"cannot be read: {reason}")]) from None
    try:
        tree, problems = _parse(text)
    except yaml.YAMLError as error:
        raise ConfigError(source, [_yaml_problem(error)]) from None
    if not isinstance(tree, dict):
        raise ConfigError(source, [("file", f"must hold a mapping of sections (got {show(tree)})")])
    for override in sets:
        problems += _apply(tree, override)
    return tree, problems


def _parse(text: str) -> tuple[Any, list[Problem]]:
    try:
        node = yaml.compose(text, Loader=_Loader)
        problems = list(_duplicates(node, "")) if node is not None else []
        return yaml.load(text, Loader=_Loader), problems
    except RecursionError:
        raise yaml.YAMLError("an anchor contains itself") from None
    except yaml.YAMLError:
        raise
    except ValueError as error:  # a date that is none, say
        raise yaml.YAMLError(f"{error}; put quotes around a value that is text") from None


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


def _apply(tree: dict[str, Any], override: str) -> list[Problem]:
    """Applies one `a.b=value` in place; the value is YAML, mappings on the way are created."""
    dotted, equals, text = override.partition("=")
    keys = dotted.strip().split(".")
    if not equals or not all(keys):
        return [(f"--set {override}", "must be KEY=VALUE, for example --set mtp.mode=parallel")]
    try:
        value, problems = _parse(text)
    except yaml.YAMLError as error:
        return [(f"--set {override}", f"the value is {_yaml_problem(error)[1]}")]
    if problems:
        return problems
    node = tree
    for depth, key in enumerate(keys[:-1], start=1):
        if node.get(key) is None:
            node[key] = {}
        if not isinstance(node[key], dict):
            parent = ".".join(keys[:depth])
            text = f"{parent} is {show(node[key])}, not a mapping; set {parent} as a whole"
            return [(f"--set {override}", text)]
        # its own: a YAML alias may stand for the same mapping elsewhere
        node[key] = dict(node[key])
        node = node[key]
    node[keys[-1]] = value
    return []


# --- reporting ----------------------------------------------------------------------------------------------

_BOUNDS = {
    "greater_than_equal": ">= {ge}",
    "greater_than": "> {gt}",
    "less_than_equal": "<= {le}",
    "less_than": "< {lt}",
}
_TYPES = {
    "int": "an integer",
    "float": "a number",
    "bool": "true or false",
    "string": "text; put it in quotes",
    "tuple": "a list",
    "dict": "a mapping",
    "model": "a mapping",
    "finite": "finite",
}


def problems_of(error: ValidationError, tree: Any, schema: type[BaseModel]) -> list[Problem]:
    """Every problem of one pydantic error. tree: what was validated; schema: its model, for
    suggestions.
    """
    problems: list[Problem] = []
    paths = key_paths(schema)
    for item in error.errors(include_url=False):
        key = _dotted(item["loc"], tree, missing=item["type"] == "missing")
        cause = item.get("ctx", {}).get("error")
        if isinstance(cause, KeyProblems):
            problems += [(f"{key}.{name}".strip("."), text) for name, text in cause.problems]
        elif item["type"] == "extra_forbidden":
            problems.append((key, "unknown key" + did_you_mean(key, paths)))
        else:
            problems.append((key, _describe(item)))
    return problems


def _describe(item: Any) -> str:
    kind, context, got = item["type"], item.get("ctx", {}), f"(got {show(item['input'])})"
    if kind == "missing":
        return "missing; it has no default"
    if kind in _BOUNDS:
        return f"must be {_BOUNDS[kind].format(**context)} {got}"
    if kind == "literal_error":
        return _not_among(context["expected"], item["input"])
    if kind == "union_tag_invalid":
        return f"type {_not_among(context['expected_tags'], context['tag'])}"
    if kind == "union_tag_not_found":
        return f"must be a mapping with a 'type' {got}"
    if kind == "string_too_short":
        return "must not be empty"
    if kind == "too_long":
        return f"must hold {context['max_length']} values {got}"
    if kind == "value_error":
        return f"{context['error']} {got}"
    family = kind.split("_")[0]
    if family in _TYPES:
        return f"must be {_TYPES[family]} {got}"
    return f"{item['msg'][0].lower()}{item['msg'][1:]} {got}"


def _not_among(allowed: str, value: Any) -> str:
    # pydantic: "'a', 'b' or 'c'"
    names = allowed.replace("'", "").replace(" or ", ", ").split(", ")
    text = f"must be {'one of ' * (len(names) > 1)}{', '.join(names)} (got {show(value)})"
    close = get_close_matches(str(value), names, n=1)
    return text + (f"; did you mean '{close[0]}'?" if close else "")


def _dotted(location: Sequence[int | str], tree: Any, *, missing: bool) -> str:
    """`a.b[0].c` for a pydantic location; parts that name nothing in the tree are union tags, left
    out.
    """
    path = ""
    for position, part in enumerate(location):
        if isinstance(tree, dict) and (part in tree or (missing and position == len(location) - 1)):
            path, tree = f"{path}.{part}".lstrip("."), tree.get(part)
        elif isinstance(tree, list | tuple) and isinstance(part, int):
            path, tree = f"{path}[{part}]", tree[part] if part < len(tree) else None
    return path


def show(value: Any) -> str:
    """A value the way the user wrote it in YAML, cut to a readable length."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = repr(list(value) if isinstance(value, tuple) else value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def did_you_mean(key: str, paths: Iterable[str]) -> str:
    """The known key that an unknown one most likely stands for: a close neighbour, or one
    elsewhere.
    """
    paths = list(paths)
    parent, _, name = key.rpartition(".")
    schema_parent = re.sub(r"\[\d+\]", "", parent)
    elsewhere = [path for path in paths if path.rpartition(".")[2] == name]
    siblings = {
        path.rpartition(".")[2]: path for path in paths if path.rpartition(".")[0] == schema_parent
    }
    leaves = {path.rpartition(".")[2]: path for path in paths}
    if key in paths:
        return " of this type"
    if close := get_close_matches(name, siblings, n=1, cutoff=0.75):
        found = f"{parent}.{close[0]}".lstrip(".")
    elif elsewhere:
        found = elsewhere[0]
    elif close := get_close_matches(name, siblings, n=1, cutoff=0.6):
        found = f"{parent}.{close[0]}".lstrip(".")
    elif close := get_close_matches(name, leaves, n=1, cutoff=0.8):
        found = leaves[close[0]]
    else:
        return ""
    return f"; did you mean '{found}'?"


def key_paths(schema: type[BaseModel], prefix: str = "") -> list[str]:
    """Every dotted key of a schema, through optional sections, unions and lists of sections."""
    paths = []
    for name, field in schema.model_fields.items():
        paths.append(f"{prefix}{name}")
        for nested in _models_in(field.annotation):
            paths += key_paths(nested, f"{prefix}{name}.")
    return list(dict.fromkeys(paths))


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in _models_in(argument)]
