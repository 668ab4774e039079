"""Loss and overlap by the class of the target, by entropy, by the place in the window."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from dsv3_mtp.analysis.intervals import Estimate, estimate
from dsv3_mtp.analysis.slots import Slots

ENTROPIES = (0.0, 0.5, 1.0, 2.0, 3.0, 4.0, np.inf)  # nats

Row = dict[str, Estimate]
Groups = dict[str, Row]


def rows_of(
    slots: Slots, names: Sequence[str], group: np.ndarray, other: Slots | None = None
) -> Groups:
    """Group -> its columns; group: (W, T) which of `names` each slot is in.

    Columns: share of the slots, main_loss, trigram, and per depth overlap/k and table/k; with
    another model's slots of the same windows main_loss_minus, paired.
    """
    valid, found = slots.array("valid"), {}
    for number, name in enumerate(names):
        inside = (group == number) & valid
        if inside.any():
            share = estimate(inside.astype(float), valid)
            row = {"share": share, **_columns(slots, inside, other)}
            found[name] = {key: value for key, value in row.items() if value is not None}
    return found


def _columns(slots: Slots, inside: np.ndarray, other: Slots | None) -> dict[str, Estimate | None]:
    loss = slots.array("loss")
    row = {"main_loss": estimate(loss, inside)}
    if other is not None:
        row["main_loss_minus"] = estimate(loss - other.array("loss"), inside)
    if slots.trigram:
        row["trigram"] = estimate(slots.array("trigram"), inside)
    taught = slots.array("taught") if slots.taught else np.zeros((len(loss), 0, loss.shape[1]))
    for depth in range(taught.shape[1]):
        there = inside & taught[:, depth]
        row[f"overlap/{depth + 1}"] = estimate(slots.array("overlap")[:, depth], there)
        if slots.table:
            row[f"table/{depth + 1}"] = estimate(slots.array("table")[:, depth], there)
    return row


def entropy_groups(entropy: np.ndarray) -> tuple[list[str], np.ndarray]:
    """Names of the bins and the bin of every slot."""
    bins = list(pairwise(ENTROPIES))
    names = [f"{low:g} or more" if high == np.inf else f"{low:g} to {high:g}" for low, high in bins]
    # rounding can leave an entropy of -1e-17
    return names, np.clip(np.digitize(entropy, ENTROPIES) - 1, 0, len(names) - 1)


def position_groups(windows: int, length: int) -> tuple[list[str], np.ndarray]:
    """Slots 0, 1, 2 to 3, 4 to 7, ...: the tokens that can be read double from group to group."""
    number = np.floor(np.log2(np.arange(length).clip(1))).astype(int) + (np.arange(length) > 0)
    names = []
    for group in range(number.max() + 1):
        first, last = np.flatnonzero(number == group)[[0, -1]]
        names.append(f"{first}" if first == last else f"{first} to {last}")
    return names, np.broadcast_to(number, (windows, length))
