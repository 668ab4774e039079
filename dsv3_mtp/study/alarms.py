"""What makes a study uninterpretable, whatever its p values: said in the report's first line."""

from collections.abc import Iterator
from statistics import fmean

from dsv3_mtp.decode.generation import REPEATS
from dsv3_mtp.study.archive import RunRecord, Table
from dsv3_mtp.study.findings import LOSS, values_of
from dsv3_mtp.study.matrix import Study
from dsv3_mtp.study.metric_names import bounds, describe_metric

NEAR = 0.03  # share of a metric's range that counts as its end
TRIGRAM = "val/floor/trigram"
LOWER = {"unigram": "val/floor/unigram", "bigram": "val/floor/bigram"}  # tables of fewer tokens


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
    high = []
    for arm in arms:
        floors, losses = values_of(table, arm, TRIGRAM), values_of(table, arm, LOSS)
        seeds = [seed for seed in losses if seed in floors]
        if seeds:
            loss, floor = fmean(losses[s] for s in seeds), fmean(floors[s] for s in seeds)
            if loss >= floor:
                tables = {name: values_of(table, arm, key) for name, key in LOWER.items()}
                worst = next(
                    (name for name, of in tables.items() if of and loss >= fmean(of.values())), None
                )
                worse = f", worse than a {worst} table" if worst else ""
                high.append(f"{arm} {loss:.3f} against {floor:.3f}{worse}")
    if high:
        yield (
            "the main model is not below the trigram floor of its own training tokens "
            f"({', '.join(high)} nats per token); drafting numbers are early-training numbers"
        )


def dirty(table: Table) -> str | None:
    """Runs from a tree with uncommitted changes cannot be repeated; None: there are none."""
    runs = [r for seeds in table.values() for r in seeds.values()]
    names = [r.name for r in runs if any(start.dirty for start in r.starts)]
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    text = f"made from a tree with uncommitted changes ({shown})"
    return f"{text}: it cannot be repeated from a commit" if names else None
