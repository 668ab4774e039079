"""What the names in `mtp.mode` and `mtp.objective` stand for: classes, which are imported late."""

import importlib
from collections.abc import Iterator, Set
from typing import Any

from dsv3_mtp.config import code
from dsv3_mtp.config.reader import Problem, not_among, show

MOST_AHEAD = 4097  # tokens: the largest offset that a kind of the package can be set to


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
    return code.subclass(mode, importlib.import_module("dsv3_mtp.heads.base").Head)


def objective_kind(name: str) -> Any:
    """The class that a name in `mtp.objective` stands for. Raises ValueError: there is none."""
    if not code.is_code(name):
        known = importlib.import_module("dsv3_mtp.objectives").registry()
        if name not in known:
            raise ValueError(not_among(list(known), name))
        return known[name]
    base = importlib.import_module("dsv3_mtp.objectives.base")
    found: Any = code.subclass(name, base.Objective)
    called = getattr(found, "name", None)
    if not (isinstance(called, str) and called.isidentifier()) or called in base.TAKEN:
        taken = f"{', '.join(sorted(base.TAKEN))} are logged already"
        text = f"must have a name of letters, digits and underscores; {taken} (got {show(called)})"
        raise ValueError(f"{name} {text}")
    try:
        found()
    except Exception as error:  # whatever a stranger's constructor raises
        raise ValueError(f"{name}() has no arguments, but {error}") from error
    return found


def head_problems(mtp: Any) -> Iterator[Problem]:
    """What a head of a file of one's own says of itself and cannot be: every other answer rests on
    it.
    """
    kind, states = mtp.kind, ("last_input", "pre_norm", "post_norm")
    reads = kind.reads(mtp)
    layers = [] if not isinstance(reads, Set) else [j for j in reads if j not in states]
    if not isinstance(reads, Set) or not all(_whole(j) and j >= 0 for j in layers):
        text = f"{mtp.mode}: reads(mtp) must be a set of {', '.join(states)} or numbers of layers"
        yield "mode", f"{text} (got {show(reads)})"
    for depth in range(1, 1 + mtp.depths):
        offset, horizon = kind.offset(mtp, depth), kind.horizon(mtp, depth)
        if not (_whole(offset) and _whole(horizon) and 0 <= horizon < offset <= MOST_AHEAD):
            text = f"0 <= horizon(mtp, {depth}) < offset(mtp, {depth}) <= {MOST_AHEAD} must hold"
            yield "mode", f"{mtp.mode}: {text} (got {show(horizon)} and {show(offset)})"
            return


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
