"""What the heads are trained on, an objective in one file; base.py says what one is."""

from dsv3_mtp.config.registry import import_all


def registry() -> dict[str, type]:
    """Every objective of this folder by its name in `mtp.objective`, the label's first."""
    from dsv3_mtp.objectives.base import REGISTRY

    import_all(__name__)
    return dict(sorted(REGISTRY.items(), key=lambda item: (item[1].teacher, item[0])))
