"""The base class of all sections, and the kinds of values that their keys have."""

import os
import re
from collections.abc import Iterator
from enum import Enum
from typing import Annotated, Any, ClassVar, Self

import pydantic
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, Strict

from dsv3_mtp.config.reader import KeyProblems, Problem


def not_bool(value: Any) -> Any:
    if isinstance(value, bool):  # pydantic would read true as 1
        raise ValueError("must be a number")
    return value


def not_number(value: Any) -> Any:
    if isinstance(value, int | float) and not isinstance(value, bool):  # 1 equals true
        raise ValueError("must be no number")
    return value


_NUMBER = re.compile(r"[-+]?(\d[\d_]*\.?\d*|\.\d+)([eE][-+]?\d+)?|[-+]?(nan|inf(inity)?)", re.I)


def _unquoted(value: Any) -> Any:
    """pydantic would read the text '1' as the number; other text is left to its own message."""
    if isinstance(value, str) and _NUMBER.fullmatch(value.strip()):
        raise ValueError("must be a number, without quotes")
    return not_bool(value)


def _path(name: str) -> str:
    if "\0" in name:
        raise ValueError("must be a path: a zero byte is in it")
    return os.path.expanduser(name)


def _plain_name(name: str) -> str:
    if name in (".", "..") or "/" in name or "\\" in name or not name.isprintable():
        raise ValueError("must be a plain folder name; put folders into run.dir")
    return name


Boolean = Annotated[bool, Strict()]  # pydantic would read 0 and 'off' as false
Integer = Annotated[int, BeforeValidator(_unquoted)]
Number = Annotated[float, BeforeValidator(_unquoted)]
Count = Annotated[Integer, Field(ge=1, le=2**62)]
NotNegativeCount = Annotated[Integer, Field(ge=0, le=2**62)]
# Bounds that no model comes near: a stranger's config.json must not keep this machine busy.
Width = Annotated[Integer, Field(ge=1, le=2**20)]
Layers = Annotated[Integer, Field(ge=1, le=1024)]
# Squares of larger numbers are no finite float32.
NotNegative = Annotated[Number, Field(ge=0, le=1e18)]
Positive = Annotated[Number, Field(gt=0, le=1e18)]
Fraction = Annotated[Number, Field(ge=0, le=1)]
Text = Annotated[str, Strict(), Field(min_length=1)]
# no shell expands the ~ of a config or of --set
FilePath = Annotated[Text, AfterValidator(_path)]
FolderName = Annotated[Text, AfterValidator(_plain_name)]  # of run.name


class OnResume(Enum):
    """What a start may do with a key whose value differs from the checkpoint's. A key says it in
    its annotation, else its section does in `on_resume`, else the section that holds that one
    (resume.py).
    """

    FIXED = "refused: the weights or the place in the data fit the old value only"
    RECORDED = "said and recorded; refused where the run is finished"
    FREE = "accepted: no effect on what is learned"


class Section(BaseModel):
    """A frozen group of keys. `rules` yields what is wrong between them, as (key, text)."""

    on_resume: ClassVar[OnResume | None] = None

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )

    def rules(self) -> Iterator[Problem]:
        yield from ()

    @pydantic.model_validator(mode="after")
    def _check_rules(self) -> Self:
        if problems := list(self.rules()):
            raise KeyProblems(problems)
        return self
