"""The first screen of a report: question, answer, one picture, and what the study does not show."""

from collections.abc import Iterable, Sequence

from dsv3_mtp.report.progress import quantity
from dsv3_mtp.study import findings, trends, words
from dsv3_mtp.study.alarms import TRIGRAM, alarms, dirty, primary_arms
from dsv3_mtp.study.corpus import other_corpus
from dsv3_mtp.study.findings import Findings, values_of
from dsv3_mtp.study.matrix import EVERY_ARM
from dsv3_mtp.study.page import Element, Heading, Items, Paragraph, Picture

GOALS = ("question", "expectation", "primary", "comparisons", "arms")  # keys of a study's claims
SMALL = 10_000_000  # parameters below which a report says that its scale is small


def opening(found: Findings, pictures: Sequence[Picture]) -> list[Element]:
    """pictures: the answer's, if it was drawn."""
    study = found.loaded.study
    answer = words.answer(study, found.effects)
    answer += trends.sentences(trends.slopes_of(study, found.table))
    warnings = [f"Not interpretable: {alarm}." for alarm in alarms(study, found.table)]
    if text := dirty(found.table):
        warnings.append(f"{text[0].upper()}{text[1:]}.")
    return [
        *([Paragraph(" ".join(warnings))] if warnings else []),
        Heading(study.run.name, 1),
        Heading("Question"),
        Paragraph(study.question.strip()),
        Heading("Answer"),
        Paragraph(" ".join(answer)),
        *_moved(found),
        *pictures,
        Heading("What it does not show"),
        Items(list(not_shown(found))),
    ]


def _moved(found: Findings) -> list[Element]:
    """A line where the plan was changed once runs had finished."""
    late = [c for c in found.plan.changes if c.finished and c.key.startswith(GOALS)]
    keys = ", ".join(dict.fromkeys(change.key for change in late))
    first = min((change.finished for change in late), default=0)
    text = f"Changed when {first} or more runs had finished: {keys} (the plan, below)."
    return [Paragraph(text)] if late else []


def not_shown(found: Findings) -> Iterable[str]:
    study, records = found.loaded.study, found.records
    if study.limits:
        yield study.limits.strip()
    size = max(record.parameters["training"] for record in records)
    scale = f"{quantity(size)} parameters, {quantity(max(r.tokens for r in records))} tokens"
    small = " This is far below the scale of the papers: signs and sizes can be others there."
    yield f"Anything beyond its scale: up to {scale}.{small if size < SMALL else ''}"
    rate = study.learning_rate
    if rate is None:
        yield (
            "Whether another learning rate would change it: the study does not say for which "
            "arm it was tuned."
        )
    elif rate.tuned_for == EVERY_ARM:
        yield f"The learning rate was tuned for every arm ({rate.source})."
    else:
        yield (
            "Whether a rate of their own would help the other arms: the learning rate was tuned "
            f"for {rate.tuned_for} ({rate.source})."
        )
    unresolved = [f"{d.arm} against {d.against}, {d.metric}" for d in found.power if d.unresolved]
    if unresolved:
        yield (
            "What was unresolved in advance, because the effect expected is smaller than what "
            f"these seeds can find: {'; '.join(unresolved)}."
        )
    on_text = any(record.config["data"].get("task") is None for record in records)
    arms = primary_arms(study)
    bare = [arm for arm in arms if not values_of(found.table, arm, TRIGRAM)]
    if on_text and bare:
        which = "the models" if len(bare) == len(arms) else ", ".join(bare)
        whether = f"Whether {which} beat n-gram tables of the same tokens"
        yield f"{whether}: these floors were not measured."
    hashes = {d.hash for record in records for start in record.starts for d in start.data.values()}
    if (note := other_corpus(study, hashes)) is not None:
        yield note
    primary = [effect for effect in found.effects if effect.primary]
    apart = any(findings.trunks_apart(found.table, e.arm, e.against) for e in primary)
    if apart and study.primary.metric.startswith("val/overlap/"):
        yield (
            "Which heads are better by overlap alone: the trunks were trained apart, and overlap "
            "falls as a trunk learns. Read it with the main loss (below)."
        )
