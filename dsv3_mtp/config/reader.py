"""From a faulty tree to one readable report. Nothing here knows the keys of a run; run.py and
model.py do.

The report lists every problem at once:

    configs/v3_tiny.yaml: 2 problems
      mtp.num_nextn_predict_layer: unknown key; did you mean 'mtp.num_nextn_predict_layers'?
      train.micro_batch_size: must be >= 1 (got 0)
"""

import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from dsv3_mtp.config.synonyms import our_key

Problem = tuple[str, str]  # (dotted key, what is wrong with it and what to do)
UNKNOWN = "unknown key"  # `problems_of` adds the key that was probably meant


class ConfigError(ValueError):
    """A config that cannot be used: str(error) is the whole report, error.problems its lines."""

    def __init__(self, source: str, problems: Sequence[Problem]) -> None:
        count = f"{len(problems)} problem" + "s" * (len(problems) != 1)
        lines = [f"  {key}: {text}" for key, text in problems]
        super().__init__("\n".join([f"{source}: {count}", *lines]))
        self.problems = tuple(problems)


class KeyProblems(ValueError):
    """Raised by a section's validator; the keys are relative to the section."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        super().__init__("; ".join(f"{key}: {text}" for key, text in problems))
        self.problems = tuple(problems)


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
    """Every problem of an error. tree: what was validated; schema: its model, for suggestions."""
    problems: list[Problem] = []
    paths = key_paths(schema)
    found = error.errors(include_url=False)
    inner = {item["loc"][:-1] for item in found}
    for item in found:
        if item["type"] == "too_short" and item["loc"] in inner:
            continue  # pydantic does not count what is wrong inside
        key, _ = _walk(item["loc"], tree, missing=item["type"] == "missing")
        cause = item.get("ctx", {}).get("error")
        if isinstance(cause, KeyProblems):
            for name, text in cause.problems:
                name = f"{key}.{name}".strip(".")
                more = did_you_mean(name, paths) if text == UNKNOWN else ""
                problems.append((name, text + more))
        elif item["type"] == "extra_forbidden":
            _, section = _walk(item["loc"][:-1], tree)
            more = of_other_types(key, section, schema) or did_you_mean(key, paths)
            problems.append((key, UNKNOWN + more))
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
        return not_among(_options(context["expected"]), item["input"])
    if kind == "union_tag_invalid":
        return f"type {not_among(_options(context['expected_tags']), context['tag'])}"
    if kind == "union_tag_not_found":
        return f"must be a mapping with a 'type' {got}"
    if kind == "string_too_short":
        return "must not be empty"
    if kind == "too_long":
        return f"must hold {context['max_length']} values {got}"
    if kind == "too_short":
        return f"must hold at least {context['min_length']} {got}"
    if kind == "value_error":
        return f"{context['error']} {got}"
    family = kind.split("_")[0]
    if family in _TYPES:
        return f"must be {_TYPES[family]} {got}"
    return f"{item['msg'][0].lower()}{item['msg'][1:]} {got}"


def _options(allowed: str) -> list[str]:
    """pydantic's "'a', 'b' or 'c'" as a list."""
    return allowed.replace("'", "").replace(" or ", ", ").split(", ")


def not_among(names: Sequence[str], value: Any) -> str:
    """What is said of a value that is none of `names`."""
    text = f"must be {'one of ' * (len(names) > 1)}{', '.join(names)} (got {show(value)})"
    close = get_close_matches(str(value), names, n=1)
    return text + (f"; did you mean '{close[0]}'?" if close else "")


def _walk(location: Sequence[int | str], tree: Any, *, missing: bool = False) -> tuple[str, Any]:
    """`a.b[0].c` for a pydantic location, and what is there; parts that name nothing in the tree
    are union tags. missing: the last part names a key that is not there.
    """
    path = ""
    for position, part in enumerate(location):
        if isinstance(tree, dict) and (part in tree or (missing and position == len(location) - 1)):
            path, tree = f"{path}.{part}".lstrip("."), tree.get(part)
        elif isinstance(tree, list | tuple) and isinstance(part, int):
            path, tree = f"{path}[{part}]", tree[part] if part < len(tree) else None
    return path, tree


def show(value: Any) -> str:
    """A value the way the user wrote it in YAML, cut to a readable length."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = repr(list(value) if isinstance(value, tuple) else value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def did_you_mean(key: str, paths: Iterable[str]) -> str:
    """The known key that an unknown one most likely stands for: what others call it, a close
    neighbour, or one elsewhere.
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
    if (ours := our_key(f"{schema_parent}.{name}")) in paths:
        return f"; did you mean '{ours}'?"
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


def of_other_types(key: str, section: Any, schema: type[BaseModel]) -> str:
    """Which types have a key that this section's type lacks, and a section of one of them; "":
    none has it.
    """
    parent, _, name = key.rpartition(".")
    models = [schema]
    for part in re.sub(r"\[\d+\]", "", parent).split("."):
        fields = [m.model_fields[part].annotation for m in models if part in m.model_fields]
        models = [model for annotation in fields for model in _models_in(annotation)]
    typed = {m.model_fields["type"].default: m for m in models if "type" in m.model_fields}
    have = {t: typed[t] for t in sorted(t for t in typed if isinstance(t, str))}
    have = {t: model for t, model in have.items() if name in model.model_fields}
    if not have or not isinstance(section, dict) or section.get("type") not in typed:
        return ""
    own = [field for field in typed[section["type"]].model_fields if field != "type"]
    text = f" of type {section['type']} ({', '.join(own)}); {name} is a key of {', '.join(have)}"
    made = [_example(kind, model, section) for kind, model in have.items()]
    examples = sorted((one for one in made if one), key=lambda one: len(one.keys() - section))
    if not examples:
        return text
    pairs = [(k, v if isinstance(v, str) else show(v)) for k, v in examples[0].items()]
    return f"{text}: write {parent}={{{', '.join(f'{k}: {v}' for k, v in pairs)}}}"


def _example(kind: str, model: type[BaseModel], section: dict[str, Any]) -> dict[str, Any] | None:
    """A valid section of this type with the given values; what they leave open gets the first
    number that was given. None: that makes none.
    """
    values = [section[key] for key in section if key not in model.model_fields]
    flat = [one for v in values for one in (v if isinstance(v, list | tuple) else [v])]
    numbers = [v for v in flat if isinstance(v, int | float) and not isinstance(v, bool)]
    filled = {key: section[key] for key in model.model_fields if key in section} | {"type": kind}
    for key, field in model.model_fields.items():
        if field.is_required() and key not in filled and numbers:
            filled[key] = numbers[0]
    try:
        model.model_validate(filled)
    except ValidationError:
        return None
    return {key: filled[key] for key in model.model_fields if key in filled}


def key_paths(schema: type[BaseModel], prefix: str = "") -> list[str]:
    """Every dotted key of a schema, through optional sections, unions and lists of sections, and
    those that a section takes from elsewhere (`more_keys`).
    """
    paths = [f"{prefix}{name}" for name in getattr(schema, "more_keys", list)()]
    for name, field in schema.model_fields.items():
        paths.append(f"{prefix}{name}")
        for nested in _models_in(field.annotation):
            paths += key_paths(nested, f"{prefix}{name}.")
    return list(dict.fromkeys(paths))


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        kinds = annotation.__subclasses__()  # of a section that is chosen by its type
        return [annotation, *(model for kind in kinds for model in _models_in(kind))]
    return [model for argument in get_args(annotation) for model in _models_in(argument)]
