"""Kinds of heads, each whole in one file of this folder; base.py says what a kind of head is."""

import importlib
import pkgutil
from functools import cache


def registry() -> dict[str, type]:
    """Every kind of head of this folder by its name in `mtp.mode`, the default first."""
    from dsv3_mtp.heads.base import REGISTRY

    _import_all()
    return dict(sorted(REGISTRY.items(), key=lambda item: (not item[1].default, item[0])))


@cache
def _import_all() -> None:
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
