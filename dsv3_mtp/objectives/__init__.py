"""What the heads are trained on, each objective in one file of this folder; base.py says what an
objective is.
"""

import importlib
import pkgutil


def registry() -> dict[str, type]:
    """Every objective of this folder by its name in `mtp.objective`, the label's first."""
    from dsv3_mtp.objectives.base import REGISTRY

    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    return dict(sorted(REGISTRY.items(), key=lambda item: (item[1].teacher, item[0])))
