"""Writes the pages that are made from the code: `python docs/write_pages.py`. A test compares them.

docs/config.md   every key of a run: the pydantic sections and their docstrings
docs/api.md      every name that `dsv3_mtp` exports: signatures and docstrings
"""

import inspect
import re
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

import dsv3_mtp
from dsv3_mtp.config import Config
from dsv3_mtp.config.depth_weights import DEPTH_WEIGHTS
from dsv3_mtp.config.loss_weights import LOSS_WEIGHTS
from dsv3_mtp.config.resume import rule_of
from dsv3_mtp.config.section import OnResume
from dsv3_mtp.config.source import SOURCES
from dsv3_mtp.config.task import TASKS
from dsv3_mtp.config.tree import dump_tree
from dsv3_mtp.heads import registry as heads

DOCS = Path(__file__).parent
CHOSEN = {"mtp.loss_weight": LOSS_WEIGHTS, "mtp.depth_weights": DEPTH_WEIGHTS, "data.task": TASKS}
RULES = {OnResume.FIXED: "fixed", OnResume.RECORDED: "recorded", OnResume.FREE: "free"}
BOUNDS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}


def config_page() -> str:
    parts = [
        "# Every key of a run",
        "Made from the code by `python docs/write_pages.py`. `configs/v3_tiny.yaml` is a whole "
        "document with comments; `--set a.b=c` overrides a key, and `dsv3 plan --config FILE "
        '--yaml` prints what a file stands for. "V3" is arXiv 2412.19437, numbers in brackets are '
        "DeepSeek-V3's own, fractions are of `train.total_tokens`.",
        "The last column says what a resumed run may do with another value: *fixed*: it is "
        "refused, the weights or the place in the data fit the old value only; *recorded*: it is "
        "said and recorded, and refused where the run is finished; *free*: it has no effect on "
        "what is learned.",
    ]
    for name, field in Config.model_fields.items():
        section = _section(field.annotation)
        parts.append(f"## {name}")
        if section is None:
            parts += [_text(field.description), _row_rule(name)]
            continue
        parts.append(_text(section.__doc__))
        parts.append(_table(list(_rows(section, f"{name}."))))
        if name == "mtp":
            parts += list(_heads())
        for key, registry in CHOSEN.items():
            if key.partition(".")[0] == name:
                parts += list(_kinds(f"`{key}`", registry))
        if name == "data":
            parts += list(_kinds("`data.train`, `data.val`: a mapping with a `type`", SOURCES))
    return "\n\n".join(parts) + "\n"


def _heads() -> Iterator[str]:
    yield "### Keys of one kind of heads"
    yield "They stand in `mtp:` too, and only beside the mode that has them."
    for name, kind in heads().items():
        rows = list(_rows(kind.Options, "mtp.", short=True))
        yield f"#### mode: {name}\n\n{_text(kind.__doc__)}"
        if rows:
            yield _table(rows)


def _kinds(what: str, registry: Any) -> Iterator[str]:
    yield f"### Types of {what}"
    for name, kind in registry.items():
        rows = [row for row in _rows(kind, "", resume=False) if row[0] != "`type`"]
        yield f"#### type: {name}\n\n{_text(kind.__doc__)}"
        if rows:
            yield _table(rows)


def _rows(
    section: type[BaseModel], prefix: str, *, short: bool = False, resume: bool = True
) -> Iterator[list[str]]:
    """Key, values, default, meaning, rule on resume."""
    for name, field in section.model_fields.items():
        key = f"{prefix}{name}"
        inner = None if key in CHOSEN else _section(field.annotation)
        rule = _row_rule(key) if resume and not short else ""
        default = "" if field.is_required() else _default(field)
        if inner is not None:
            default = default if field.default is None else "see below"
        yield [
            f"`{name if short else key}`",
            _values(field),
            default,
            _text(field.description),
            rule,
        ]
        if inner is not None:
            yield from _rows(inner, f"{key}.", short=short, resume=resume)


def _row_rule(key: str) -> str:
    try:
        return RULES[rule_of(key)]
    except KeyError:
        return ""


def _section(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) is Annotated:
        return _section(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        found = [one for one in map(_section, get_args(annotation)) if one is not None]
        return found[0] if len(found) == 1 else None
    return None


def _values(field: FieldInfo) -> str:
    return _kind(field.annotation) + "".join(_bounds(field.metadata))


def _kind(annotation: Any) -> str:
    origin, inside = get_origin(annotation), get_args(annotation)
    if annotation is type(None):
        return "null"
    if origin is Literal:
        return ", ".join(
            f"`{str(one).lower() if isinstance(one, bool) else one}`" for one in inside
        )
    if origin is Annotated:
        return _kind(inside[0]) + "".join(_bounds(inside[1:]))
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(map(_kind, inside)))
    if origin in (tuple, list):
        kinds = dict.fromkeys(_kind(one) for one in inside if one is not Ellipsis)
        return f"list of {' and '.join(kinds)}"
    names = {int: "whole number", float: "number", bool: "true, false", str: "text"}
    return names.get(annotation, "mapping")


def _bounds(metadata: Any) -> Iterator[str]:
    for item in metadata:
        for part in [item, *getattr(item, "metadata", [])]:
            for name, sign in BOUNDS.items():
                bound = getattr(part, name, None)
                if bound is not None and abs(bound) < 2**20:  # no value comes near a larger one
                    yield f" {sign} {bound:,}" if isinstance(bound, int) else f" {sign} {bound:g}"


def _default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True, validated_data={})
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json")
    if isinstance(value, float):
        return f"`{value:.6g}`"
    if isinstance(value, dict):
        inner = ", ".join(f"{k}: {_plain(v)}" for k, v in value.items())
        return f"`{{{inner}}}`"
    return f"`{_plain(value)}`"


def _plain(value: Any) -> str:
    if isinstance(value, tuple | list):
        return "[" + ", ".join(map(_plain, value)) + "]"
    if isinstance(value, float):
        return f"{value:.6g}"
    return dump_tree(value).strip().removesuffix("...").strip()


def _text(text: str | None) -> str:
    return " ".join(inspect.cleandoc(text or "").split()).replace("|", "\\|")


def _table(rows: list[list[str]]) -> str:
    head = ["key", "value", "default", "what it is", "on resume"]
    if not any(row[4] for row in rows):
        head, rows = head[:4], [row[:4] for row in rows]
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def api_page() -> str:
    parts = [
        "# Python API",
        "Made from the docstrings by `python docs/write_pages.py`. Every name is imported as "
        "`from dsv3_mtp import NAME`; `examples/notebook.ipynb` uses them.",
        "```python\n" + _example() + "\n```",
    ]
    for name in dsv3_mtp.__all__:
        parts += _described(name, getattr(dsv3_mtp, name))
    return "\n\n".join(parts) + "\n"


def _example() -> str:
    from dsv3_mtp import api

    lines = inspect.cleandoc(api.__doc__ or "").splitlines()
    code = [line.removeprefix("    ") for line in lines if line.startswith("    ")]
    names = [name for name in ("load_config", "train_run") if any(name in line for line in code)]
    return "\n".join([f"from dsv3_mtp import {', '.join(names)}", "", *code])


def _described(name: str, found: Any) -> Iterator[str]:
    if not inspect.isclass(found):
        yield f"## {name}"
        yield f"```python\n{name}{_signature(found)}\n```"
        yield _prose(found.__doc__)
        return
    yield f"## {name}"
    if not issubclass(found, BaseModel | BaseException) and found.__init__ is not object.__init__:
        yield f"```python\n{name}{_signature(found)}\n```"
    yield _prose(found.__doc__)
    if issubclass(found, BaseModel):
        yield "Its keys: [config.md](config.md)."
    for member, value in vars(found).items():
        function = getattr(value, "fget", value)
        if member.startswith("_") or not inspect.isfunction(function) or not function.__doc__:
            continue
        if found.__module__.startswith("dsv3_mtp.model") or name in ("Trainer", "Sampler"):
            continue  # their methods are for the package: the class's docstring says how to use it
        title = member if isinstance(value, property) else f"{member}{_signature(function)}"
        yield f"### {name}.{member}"
        yield f"```python\n{title}\n```"
        yield _prose(function.__doc__)


def _signature(function: Any) -> str:
    text = str(inspect.signature(function))
    text = re.sub(r"(?<=[(\[ ,|])(?:[a-z_]\w*\.)+(?=[A-Z]\w*)", "", text)  # modules of types
    text = re.sub(r"\(self(, )?", "(", text).replace("'", "")
    return re.sub(r"<function (\w+) at 0x\w+>|<built-in function (\w+)>", r"\1\2", text)


def _prose(text: str | None) -> str:
    """A docstring as Markdown: its parts (Args, Raises) as lists, its indented code as code."""
    blocks: list[str] = []
    for block in inspect.cleandoc(text or "").split("\n\n"):
        head, _, rest = block.partition("\n")
        if head.rstrip(":") in ("Args", "Raises", "Returns") and head.endswith(":"):
            items = re.split(r"\n(?= {4}\S)", "\n" + rest)
            lines = [" ".join(item.split()) for item in items if item.strip()]
            blocks.append(f"{head}\n\n" + "\n".join(f"- {line}" for line in lines))
        elif block.startswith("    "):
            blocks.append("```\n" + inspect.cleandoc(block) + "\n```")
        else:
            blocks.append(block)
    return "\n\n".join(blocks)


PAGES = {"config.md": config_page, "api.md": api_page}

if __name__ == "__main__":
    for name, write in PAGES.items():
        (DOCS / name).write_text(write(), encoding="utf-8")
