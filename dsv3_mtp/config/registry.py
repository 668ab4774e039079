"""Sections of one kind that are chosen by their `type`: a registered name, or package.module:Class.

A folder is a registry. Each of its files registers the sections that it defines, and the package
imports all of them:

    @LOSS_WEIGHTS.register
    class ConstantWeight(LambdaSchedule):
        type: Literal["constant"] = "constant"
"""

import functools
import importlib
import pkgutil
import sys
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from pydantic_core import PydanticKnownError

from dsv3_mtp.config import code
from dsv3_mtp.config.section import Section

S = TypeVar("S", bound=Section)


class Registry(Mapping[str, type[S]]):
    """The classes of one kind by their names.

    kind: what one of them is called in messages. package: where they are, imported at the first
    look; None: they have registered themselves by then.
    """

    def __init__(self, kind: str, base: Any, package: str | None = None) -> None:
        self.kind, self.base, self.package = kind, base, package
        self._classes: dict[str, type[S]] = {}

    @property
    def classes(self) -> dict[str, type[S]]:
        if self.package is not None:
            importlib.import_module(self.package)
            self.package = None
        return self._classes

    def register(self, found: type[S]) -> type[S]:
        """Of a class known by the default of its `type`. Raises ValueError: there is another."""
        name = found.model_fields["type"].default
        if name in self._classes:
            raise ValueError(f"there are two of {self.kind} {name!r}")
        self._classes[name] = found
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self.classes)

    def __len__(self) -> int:
        return len(self.classes)

    def __getitem__(self, name: str) -> type[S]:
        """The class of a name, or of package.module:Class.

        Raises:
            KeyError: there is none of this name.
            ValueError: package.module:Class cannot be imported, or is of another kind.
        """
        if not code.is_code(name):
            return self.classes[name]
        return code.subclass(name, self.base)

    def section(self, value: Any) -> Any:
        """Validates a mapping with a `type` into the section of that type; for BeforeValidator."""
        if isinstance(value, self.base):
            return value
        if not isinstance(value, Mapping) or "type" not in value:
            raise PydanticKnownError("union_tag_not_found", {"discriminator": "'type'"})
        name = value["type"]
        try:
            found = self[name]
        except (KeyError, TypeError):  # TypeError: a list, say
            names = ", ".join(f"'{one}'" for one in sorted(self))
            context = {"discriminator": "'type'", "tag": str(name), "expected_tags": names}
            raise PydanticKnownError("union_tag_invalid", context) from None
        return found.model_validate(value)


@functools.cache
def import_all(package: str) -> None:
    """Imports every module of a package, so that each registers what it defines; once."""
    for module in pkgutil.iter_modules(sys.modules[package].__path__):
        importlib.import_module(f"{package}.{module.name}")
