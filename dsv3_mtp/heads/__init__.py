"""Kinds of heads, each whole in one file of this folder; base.py says what a kind of head is."""

from dsv3_mtp.config.registry import import_all


def registry() -> dict[str, type]:
    """Every kind of head of this folder by its name in `mtp.mode`, the default first."""
    from dsv3_mtp.heads.base import REGISTRY

    import_all(__name__)
    return dict(sorted(REGISTRY.items(), key=lambda item: (not item[1].default, item[0])))
