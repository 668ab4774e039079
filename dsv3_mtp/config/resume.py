"""Which settings of a run may differ from those of its checkpoint: what each key says of itself."""

from collections.abc import Iterator, Mapping
from typing import Any, TypeGuard

from dsv3_mtp.config.run import Config
from dsv3_mtp.config.section import OnResume, Section


def rule_of(key: str) -> OnResume:
    """What a start may do with the dotted key where it differs from the checkpoint's. Raises
    KeyError: neither the key nor a section around it says so.
    """
    section: Any = Config
    rule: OnResume | None = None
    for name in key.split("."):
        if not _is_section(section):
            break  # the rest lies in a value of several kinds, such as a schedule or a task
        rule = section.on_resume or rule
        field = section.model_fields[name]
        own = [entry for entry in field.metadata if isinstance(entry, OnResume)]
        rule, section = (own[0] if own else rule), field.annotation
    if rule is None:
        raise KeyError(f"{key}: give its section an `on_resume`, or its annotation an OnResume")
    return rule


def _is_section(kind: Any) -> TypeGuard[type[Section]]:
    """Not one that is chosen by its type."""
    return isinstance(kind, type) and issubclass(kind, Section) and not kind.__subclasses__()


def keys(section: type[Section] = Config, prefix: str = "") -> Iterator[str]:
    """All keys of a run, dotted; a value of several kinds is one key."""
    for name, field in section.model_fields.items():
        kind = field.annotation
        if _is_section(kind):
            yield from keys(kind, f"{prefix}{name}.")
        else:
            yield prefix + name


FREE = tuple(key for key in keys() if rule_of(key) is OnResume.FREE)


def differences(
    before: Mapping[str, Any], now: Mapping[str, Any], *, ignoring: tuple[str, ...] = ()
) -> dict[str, tuple[Any, Any]]:
    """Dotted key -> (before, now) of every setting that differs, but those under `ignoring`."""
    old, new = dict(flat(before)), dict(flat(now))
    changed = [key for key in sorted(old | new) if old.get(key) != new.get(key)]
    return {key: (old.get(key), new.get(key)) for key in changed if not _under(key, ignoring)}


def _under(key: str, prefixes: tuple[str, ...]) -> bool:
    return any(key == prefix or key.startswith(prefix + ".") for prefix in prefixes)


def flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every setting; one that is an empty mapping is its own value."""
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
