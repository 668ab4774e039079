"""What the heads are trained on, each objective in one file of this folder; base.py says what an
objective is.
"""

from dsv3_mtp.config.registry import import_all


def registry() -> dict[str, type]:
    """Every objective of this folder by its name in `mtp.objective`, the label's first."""
    from dsv3_mtp.objectives.base import REGISTRY

    import_all(__name__)
    return dict(sorted(REGISTRY.items(), key=lambda item: (item[1].teacher, item[0])))
