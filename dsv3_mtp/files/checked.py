"""JSON that the project wrote itself, or that a stranger gives it: read with its shape checked.

A shape is a pydantic type, mostly a TypedDict beside the code that writes the file. What is wrong
is one sentence with the file's name, whatever it is: cut off, not UTF-8, nested without end, of
wrong types, larger than any that is written.
"""

from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast

from pydantic import ConfigDict, TypeAdapter, ValidationError

T = TypeVar("T")

# Keys that a shape does not name are kept; numbers are not made of text, nor integers of floats.
OPEN = ConfigDict(extra="allow", strict=True)
LARGEST = 2**28  # bytes: the index of a checkpoint with a million tensors has fewer
SHOWN = 3  # problems that one sentence lists


def read_json(path: Path, shape: type[T], remedy: str) -> T:
    """The content of a JSON file.

    remedy: what to do about a damaged file, as a clause: "delete it, and it is made again".

    Raises:
        ValueError: the file cannot be read, is no JSON, or has another shape.
    """
    try:
        if (size := path.stat().st_size) > LARGEST:
            raise ValueError(f"{size:,} bytes, more than {LARGEST:,}")
        return parse_json(path.read_bytes(), shape)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}); {remedy}") from None
    except ValueError as error:
        raise ValueError(f"{path}: damaged ({error}); {remedy}") from None


def parse_json(text: str | bytes, shape: type[T]) -> T:
    """Raises ValueError, whose text says what is wrong with `text` and does not name its file."""
    if not text.strip():
        raise ValueError("it is empty")
    try:
        return _adapter(cast(Any, shape)).validate_json(text)
    except ValidationError as error:
        faults = error.errors(include_url=False, include_input=False, include_context=False)
    lines = [_line(fault) for fault in faults[:SHOWN]]
    more = f", and {len(faults) - SHOWN} more" if len(faults) > SHOWN else ""
    raise ValueError("; ".join(lines) + more)


def _line(fault: Any) -> str:
    where = ".".join(str(part) for part in fault["loc"])
    return f"{where}: {fault['msg']}" if where else str(fault["msg"])


@cache
def _adapter(shape: Any) -> TypeAdapter[Any]:
    return TypeAdapter(shape)
