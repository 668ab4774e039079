"""Effects in plain words; never more than the interval says."""

from collections.abc import Sequence

from dsv3_mtp.study.findings import FEWEST, Effect
from dsv3_mtp.study.matrix import Study
from dsv3_mtp.study.metric_names import describe_metric, is_rate_over_seeds


def verdict(effect: Effect, *, margin: float | None, lost_runs: Sequence[str]) -> str:
    """One effect in words; never more than the interval says. lost_runs: those that diverged."""
    words, better = describe_metric(effect.metric)
    subject = f"{effect.arm} against {effect.against}, {words}:"
    i = effect.interval
    if i is None:
        return f"{subject} not measured."
    if effect.few:
        count = "one seed" if i.n == 1 else f"{i.n} seeds"
        return f"{subject} {i.mean:+.4g} with {count}: no conclusion."
    tail = f"{expectation(effect)}."
    if lost_runs:
        tail += f" Left out, which counts against their arm: {', '.join(lost_runs)}."
    if is_rate_over_seeds(effect.metric):
        found = "a difference" if effect.shown else "a hint only"
        found = found if effect.stands_out else "no detectable difference"
        test = f"McNemar p = {effect.p:.3g}, Holm p = {effect.adjusted_p:.3g}"
        return f"{subject} {found}, {i.mean:+.2f}, n = {i.n} ({test}){tail}"
    size = f"{i.mean:+.4g} [{i.low:+.4g}, {i.high:+.4g}], n = {i.n}"
    same = ""
    if margin is not None and effect.equivalence_p is not None:
        shown = f"{'' if effect.equal else 'not '}shown to be within +-{margin:g}"
        same = f"{shown} (TOST p = {effect.equivalence_p:.2g})"
    if not effect.stands_out:
        return f"{subject} no detectable difference, {size}{f'; {same}' if same else ''}{tail}"
    direction = "higher" if i.mean > 0 else "lower"
    good = f", which is {'better' if direction == better else 'worse'}" if better else ""
    if not effect.shown:
        return f"{subject} a hint only: {direction}, {size}, Holm p = {effect.adjusted_p:.2g}{tail}"
    small = f", but {same}" if same and effect.equal else ""
    return f"{subject} {direction}, {size}, Holm p = {effect.adjusted_p:.2g}{good}{small}{tail}"


def expectation(effect: Effect) -> str:
    """How the effect lies to what was expected of it; empty where nothing was said of it."""
    i, expected = effect.interval, effect.expected
    if expected is None or i is None or effect.few:
        return ""
    if expected == 0:
        if effect.shown and not effect.equal:
            return "; against the expectation of no difference"
        return "; as expected" if effect.equal else "; expected was no difference, not shown"
    if effect.shown:
        agrees = (i.mean > 0) == (expected > 0)
        return "; as expected" if agrees else f"; against the expectation of {expected:+g}"
    if not is_rate_over_seeds(effect.metric) and not i.low <= expected <= i.high:
        return f"; against the expectation of {expected:+g}, which the interval leaves out"
    return f"; expected was {expected:+g}: not resolved"


def answer(study: Study, effects: Sequence[Effect]) -> list[str]:
    """The primary comparison in two or three sentences; arms of the same outcome together."""
    words, better = describe_metric(study.primary.metric)
    groups: dict[str, list[str]] = {}
    against = study.comparisons[study.primary.comparison].against
    primary = [effect for effect in effects if effect.primary]
    counts = {e.interval.n for e in primary if e.interval is not None}
    for e in primary:
        i = e.interval
        if i is None:
            groups.setdefault("Not measured", []).append(e.arm)
            continue
        limits = f" [{i.low:+.3g}, {i.high:+.3g}]"
        rate = is_rate_over_seeds(e.metric)
        seeds = f", n = {i.n}" if len(counts) > 1 else ""
        size = f"{e.arm} ({i.mean:+.3g}{'' if rate or e.few else limits}{seeds})"
        direction = "Higher" if i.mean > 0 else "Lower"
        good = ""
        if better:
            good = f", which is {'better' if direction.lower() == better else 'worse'}"
        if e.few:
            groups.setdefault(f"No conclusion from fewer than {FEWEST} seeds", []).append(size)
        elif e.equal:
            within = f"Equal within +-{study.primary.margin:g}"
            groups.setdefault(within, []).append(size)
        elif e.shown:
            groups.setdefault(f"{direction}{good}", []).append(size)
        elif e.stands_out:
            groups.setdefault(f"A hint only, {direction.lower()}", []).append(size)
        else:
            groups.setdefault("No detectable difference", []).append(size)
    seeds = f", n = {min(counts)}" if len(counts) == 1 else ""
    first = f"{words[0].upper()}{words[1:]}, against {against}{seeds}."
    return [first, *(f"{outcome}: {', '.join(arms)}." for outcome, arms in groups.items())]
