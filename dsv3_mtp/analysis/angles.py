"""The angle between the heads' gradient and the main loss's over training, from metrics.jsonl."""

from collections.abc import Sequence
from statistics import fmean

from dsv3_mtp.report.metrics import Record

COSINE, RATIO = "optim/gradient_cosine", "optim/gradient_ratio"
PARTS = 4


def gradient_angles(records: Sequence[Record]) -> list[dict[str, float]]:
    """Of each quarter of the run that has measurements: how many, mean, lowest and highest cosine,
    share of conflicts (cosine below 0), mean ratio of the lengths (heads' over main). 0 is the
    cosine of two directions that have nothing to do with each other.
    """
    measured = [r for r in records if COSINE in r]
    found = []
    for part in range(PARTS):
        inside = [r for r in measured if min(int(r["progress"] * PARTS), PARTS - 1) == part]
        if inside:
            cosines = [r[COSINE] for r in inside]
            row = {"from": part / PARTS, "to": (part + 1) / PARTS, "n": len(inside)}
            row |= {"cosine": fmean(cosines), "lowest": min(cosines), "highest": max(cosines)}
            row["conflicts"] = fmean(c < 0 for c in cosines)
            found.append(row | {"ratio": fmean(r[RATIO] for r in inside)})
    return found
