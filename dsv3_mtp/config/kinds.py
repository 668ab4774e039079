"""What the names in `mtp.mode` and `mtp.objective` stand for: classes, which are imported late."""

import importlib
from typing import Any

from dsv3_mtp.config import code
from dsv3_mtp.config.reader import not_among


def heads() -> dict[str, Any]:
    """Every registered kind of head by its name in `mtp.mode`. Imports torch."""
    return importlib.import_module("dsv3_mtp.heads").registry()


def head_kind(mode: str) -> Any:
    """The class that `mtp.mode` names; None for none. Raises ValueError: there is none."""
    if mode == "none":
        return None
    if not code.is_code(mode):
        known = heads()
        if mode not in known:
            raise ValueError(not_among(["none", *known], mode))
        return known[mode]
    found, base = code.find(mode), importlib.import_module("dsv3_mtp.heads.base").Head
    if not (isinstance(found, type) and issubclass(found, base)):
        raise ValueError(f"{mode} is no subclass of dsv3_mtp.heads.base.Head")
    return found


def objective_kind(name: str) -> Any:
    """The class that a name in `mtp.objective` stands for. Raises ValueError: there is none."""
    if not code.is_code(name):
        known = importlib.import_module("dsv3_mtp.objectives").registry()
        if name not in known:
            raise ValueError(not_among(list(known), name))
        return known[name]
    found, base = code.find(name), importlib.import_module("dsv3_mtp.objectives.base").Objective
    if not (isinstance(found, type) and issubclass(found, base) and hasattr(found, "name")):
        raise ValueError(f"{name} is no subclass of dsv3_mtp.objectives.base.Objective with a name")
    return found
