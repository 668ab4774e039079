"""What makes a study uninterpretable, whatever its p values: said in the report's first line."""

from collections.abc import Iterable, Iterator
from statistics import fmean

from dsv3_mtp.data.ngrams import ORDERS, smallest_table
from dsv3_mtp.decode.generation import REPEATS
from dsv3_mtp.study.archive import RunRecord, Table
from dsv3_mtp.study.findings import LOSS, values_of
from dsv3_mtp.study.matrix import Study
from dsv3_mtp.study.metric_names import bounds, describe_metric

NEAR = 0.03  # share of a metric's range that counts as its end
TRIGRAM = "val/floor/trigram"
EARLY = "drafting numbers are early-training numbers"


def alarms(study: Study, table: Table) -> list[str]:
    """Sentences that say why the primary comparison shows nothing. Empty: no reason is known."""
    arms = primary_arms(study)
    records = [r for arm in arms for r in table.get(arm, {}).values() if r.finished]
    found = [*_at_an_end(study, table, arms, records), *_repeats(study, table, arms)]
    return [*found, *_above_the_trigram(table, arms)]


def primary_arms(study: Study) -> list[str]:
    comparison = study.comparisons[study.primary.comparison]
    return [comparison.against, *comparison.arms]


def _at_an_end(
    study: Study, table: Table, arms: list[str], records: list[RunRecord]
) -> Iterator[str]:
    """Every arm lies at the same end of the metric's range: no difference could be seen."""
    metric = study.primary.metric
    depths = max((int(_depths(record)) for record in records), default=0)
    ends = bounds(metric, depths)
    means = [fmean(v.values()) for arm in arms if (v := values_of(table, arm, metric))]
    if ends is None or not means or ends[0] == ends[1]:
        return
    floor, ceiling = ends
    near = NEAR * (ceiling - floor)
    words = describe_metric(metric)[0]
    if all(mean >= ceiling - near for mean in means):
        yield f"{words}: every arm is at the ceiling, {min(means):.3g} of {ceiling:g} or more"
    if all(mean <= floor + near for mean in means):
        most = f"{max(means):.3g} or less ({floor:g} is the least)"
        yield f"{words}: every arm is at the floor, {most}"


def _depths(record: RunRecord) -> int:
    mtp = record.config["mtp"]
    return 0 if mtp["mode"] == "none" else mtp["num_nextn_predict_layers"]


def _repeats(study: Study, table: Table, arms: list[str]) -> Iterator[str]:
    """Drafts of a text that repeats itself are accepted whatever drafts them."""
    metric = study.primary.metric
    if metric.startswith("acceptance/"):
        kind = "/".join(metric.split("/")[:2])
        values = {arm: values_of(table, arm, f"{kind}/distinct") for arm in arms}
        shares = {arm: fmean(found.values()) for arm, found in values.items() if found}
        low = [f"{arm} {share:.2f}" for arm, share in shares.items() if share < REPEATS]
        if low:
            text = f"share of distinct tokens below {REPEATS:g}: {', '.join(low)}"
            yield f"the text that was drafted repeats itself ({text})"


def _above_the_trigram(table: Table, arms: list[str]) -> Iterator[str]:
    """A main model that a table of three tokens beats has not learnt what heads could help with."""
    high = {arm: found for arm in arms if (found := _worse_than(table, arm))}
    if len(high) == 1:
        [(arm, (loss, floor, name))] = high.items()
        worse = f", worse than a {name} table" if name != "trigram" else ""
        yield (
            "the main model is not below the trigram floor of its own training tokens "
            f"({arm} {loss:.3f} against {floor:.3f}{worse} nats per token); {EARLY}"
        )
    elif high:
        groups: dict[str, dict[str, float]] = {}
        for arm, (loss, _, name) in high.items():
            groups.setdefault(name, {})[arm] = loss
        first, *rest = [
            (_arms(list(losses), arms), f"({_range(losses.values())} nats)", f"a {name} table")
            for name, losses in groups.items()
        ]
        text = f"the main models of {first[0]} {first[1]} are worse than {first[2]}"
        text += "".join(f", of {names} {nats} than {worse}" for names, nats, worse in rest)
        floor_range = _range(floor for _, floor, _ in high.values())
        known = floor_range if set(groups) == {"trigram"} else f"a trigram table has {floor_range}"
        yield f"{text} of their own training tokens ({known}); {EARLY}"


def _worse_than(table: Table, arm: str) -> tuple[float, float, str] | None:
    """The main loss of an arm, its trigram floor, and the smallest table that is better. None: not
    even the trigram table is, or it was not measured.
    """
    floors, losses = values_of(table, arm, TRIGRAM), values_of(table, arm, LOSS)
    seeds = [seed for seed in losses if seed in floors]
    if not seeds:
        return None
    loss, floor = fmean(losses[s] for s in seeds), fmean(floors[s] for s in seeds)
    lower = ((order, values_of(table, arm, f"val/floor/{order}")) for order in ORDERS[:-1])
    means = {order: fmean(found.values()) for order, found in lower if found}
    name = smallest_table(loss, means | {"trigram": floor})
    return None if name is None else (loss, floor, name)


def _arms(some: list[str], every: list[str]) -> str:
    if len(some) < len(every):
        return ", ".join(some)
    return "both arms" if len(every) == 2 else f"all {len(every)} arms"


def _range(values: Iterable[float]) -> str:
    """3.420, or 4.330 to 4.420."""
    shown = [f"{value:.3f}" for value in sorted(values)]
    return shown[0] if shown[0] == shown[-1] else f"{shown[0]} to {shown[-1]}"


def dirty(table: Table) -> str | None:
    """Runs from a tree with uncommitted changes cannot be repeated; None: there are none."""
    runs = [r for seeds in table.values() for r in seeds.values()]
    names = [r.name for r in runs if any(start.dirty for start in r.starts)]
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    text = f"made from a tree with uncommitted changes ({shown})"
    return f"{text}: it cannot be repeated from a commit" if names else None
