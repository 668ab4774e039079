"""Floors of a text: what tables of 1, 2 and 3 tokens reach that were counted from the
training tokens.

    p_0 = 1 / V
    p_m(w | context) = l_m(b) count(context, w) / count(context) + (1 - l_m(b)) p_(m-1)

The context is the last m - 1 tokens; b is the power of two below count(context); a context that was
never seen leaves p_(m-1). The weights l_m(b) are those of highest likelihood on a held part of the
training tokens, found by EM (Jelinek and Mercer, 1980). A network that is not below the trigram
floor has not learnt more than this table.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf

import numpy as np

ORDERS = ("unigram", "bigram", "trigram")
HELD_EVERY = 50  # every fiftieth row of the training tokens gives the weights: 2 %
BUCKETS = 24  # of counts of a context, by powers of two
EM_STEPS = 60  # of a concave problem with one unknown per bucket
MOST_TOKENS = 2**25  # beyond, sorting them takes minutes and gigabytes


@dataclass(frozen=True)
class Events:
    """N targets and the contexts they are predicted from, in the order of the slots."""

    target: np.ndarray  # (N,) int64
    # Of 0, 1 and 2 tokens: (N,) int64 as a number in base V, -1 where the row cuts it off.
    contexts: tuple[np.ndarray, ...]

    @classmethod
    def of(cls, tokens: np.ndarray, documents: np.ndarray | None, vocab_size: int) -> "Events":
        """tokens: (R, T+1) rows as a model of T slots sees them: slot 0 has one token before its
        target.

        documents: (R, T+1) document numbers where the model masks across them: a target of another
        document than the slot's is none, and contexts end at the document's start.
        """
        rows, slots = tokens.shape[0], tokens.shape[1] - 1
        valid = np.ones((rows, slots), bool)
        if documents is not None:
            valid = documents[:, 1:] == documents[:, :-1]
        contexts = [np.zeros((rows, slots), np.int64), tokens[:, :-1].astype(np.int64)]
        for length in range(2, len(ORDERS)):
            longer = np.full((rows, slots), -1, np.int64)
            before = tokens[:, :-length].astype(np.int64)  # the token `length` before the target
            inside = contexts[-1][:, length - 1 :] >= 0
            if documents is not None:
                inside &= documents[:, :-length] == documents[:, length - 1 : -1]
            number = before * vocab_size ** (length - 1) + contexts[-1][:, length - 1 :]
            longer[:, length - 1 :] = np.where(inside, number, -1)
            contexts.append(longer)
        targets = tokens[:, 1:][valid].astype(np.int64)
        return cls(targets, tuple(context[valid] for context in contexts))


class Counts:
    """How often contexts of one length, and they with a target, occur."""

    def __init__(self, events: Events, length: int, vocab_size: int):
        self.length, self.vocab_size = length, vocab_size
        context = events.contexts[length]
        known = context >= 0
        pairs = context[known] * vocab_size + events.target[known]
        self.pairs, self.pair_counts = np.unique(pairs, return_counts=True)
        owners = self.pairs // vocab_size
        starts = np.flatnonzero(np.diff(owners, prepend=-1))
        self.contexts, self.context_counts = owners[starts], np.zeros(0, np.int64)
        if len(starts):
            self.context_counts = np.add.reduceat(self.pair_counts, starts)

    def shares(self, events: Events) -> tuple[np.ndarray, np.ndarray]:
        """(N,) count(context, target) / count(context), 0 where unseen; (N,) count(context)."""
        context = events.contexts[self.length]
        seen = _look_up(self.contexts, self.context_counts, context)
        pairs = np.where(context < 0, -1, context * self.vocab_size + events.target)
        both = _look_up(self.pairs, self.pair_counts, pairs)
        return both / np.maximum(seen, 1), seen


def _look_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The value of each wanted key, 0 where it is not among the sorted keys."""
    if not len(keys):
        return np.zeros(len(wanted), np.int64)
    place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[place] == wanted, values[place], 0)


def _bucket(counts: np.ndarray) -> np.ndarray:
    """(N,) number of the power of two below each count >= 1."""
    return np.minimum(np.log2(np.maximum(counts, 1)).astype(np.int64), BUCKETS - 1)


class NGrams:
    """Interpolated tables of up to three tokens.

    >>> NGrams(tokens, None, vocab_size=512).losses(validation_tokens, None)
    {"unigram": 5.31, "bigram": 3.83, "trigram": 3.43}
    """

    def __init__(self, tokens: np.ndarray, documents: np.ndarray | None, *, vocab_size: int):
        """tokens, documents: (R, T+1), see `Events.of`; each training token is to be a target once.
        Raises ValueError: fewer than two rows: nothing to count, or nothing to find the weights on.
        """
        if len(tokens) < 2:
            raise ValueError(f"floors need at least 2 rows of training tokens (got {len(tokens)})")
        self.vocab_size = vocab_size
        held = np.zeros(len(tokens), bool)
        held[HELD_EVERY // 2 :: HELD_EVERY] = True
        held[-1] |= not held.any()

        def events(chosen: np.ndarray) -> Events:
            of = None if documents is None else documents[chosen]
            return Events.of(tokens[chosen], of, vocab_size)

        counted, left_out = events(~held), events(held)
        self.weights: list[np.ndarray] = []  # (BUCKETS,) per order
        lower = np.full(len(left_out.target), 1 / vocab_size)
        for length in range(len(ORDERS)):
            share, seen = Counts(counted, length, vocab_size).shares(left_out)
            self.weights.append(em(share, lower, seen))
            lower = mix(share, seen, self.weights[-1], lower)
        everything = events(np.ones(len(tokens), bool))
        self.counts = [Counts(everything, length, vocab_size) for length in range(len(ORDERS))]

    def probabilities(self, events: Events) -> list[np.ndarray]:
        """Of each order (N,) the probability of every target."""
        lower, found = np.full(len(events.target), 1 / self.vocab_size), []
        for counts, weights in zip(self.counts, self.weights, strict=True):
            lower = mix(*counts.shares(events), weights, lower)
            found.append(lower)
        return found

    def losses(self, tokens: np.ndarray, documents: np.ndarray | None) -> dict[str, float]:
        """Mean nats per target of each order on rows (R, T+1)."""
        probabilities = self.probabilities(Events.of(tokens, documents, self.vocab_size))
        means = [float(-np.log(p).mean()) for p in probabilities]
        return dict(zip(ORDERS, means, strict=True))


def mix(share: np.ndarray, seen: np.ndarray, weights: np.ndarray, lower: np.ndarray) -> np.ndarray:
    """`share` of `Counts.shares` and `lower` with the weights of `em`."""
    weight = np.where(seen > 0, weights[_bucket(seen)], 0.0)
    return weight * share + (1 - weight) * lower


def em(share: np.ndarray, lower: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """(BUCKETS,) weights of `share` against `lower` of highest likelihood, by buckets of `seen`.

    A bucket without an event gets the weight of the one below it. At least a thousandth stays with
    `lower`, so that no target of the validation text has probability 0.
    """
    known = seen > 0
    share, lower, bucket = share[known], lower[known], _bucket(seen[known])
    events = np.bincount(bucket, minlength=BUCKETS)
    weights = np.full(BUCKETS, 0.5)
    for _ in range(EM_STEPS):
        mine = weights[bucket] * share
        whose = mine / (mine + (1 - weights[bucket]) * lower)
        weights = np.bincount(bucket, whose, BUCKETS) / np.maximum(events, 1)
        weights = np.clip(weights, 0.0, 0.999)
    for number in np.flatnonzero(events == 0):
        weights[number] = weights[number - 1] if number else 0.5
    return weights


def floor_metrics(
    losses: Mapping[str, float], bits_per_nat_and_byte: float | None
) -> dict[str, float]:
    """`val/floor/ORDER`, and `..._bits_per_byte` where the bytes of the text are known."""
    metrics = {f"val/floor/{name}": loss for name, loss in losses.items()}
    if (bits := bits_per_nat_and_byte) is None:
        return metrics
    return metrics | {f"{name}_bits_per_byte": loss * bits for name, loss in metrics.items()}


def smallest_table(main: float, floors: Mapping[str, float]) -> str | None:
    """The smallest of the ORDERS whose floor a main loss is not below; None: it is below the
    trigram floor, whatever the others, or that was not measured.
    """
    if main < floors.get(ORDERS[-1], inf):
        return None
    return next(order for order in ORDERS if main >= floors.get(order, inf))


def early_training(metrics: Mapping[str, float]) -> str | None:
    """What is to be said of a text run that is not below the trigram floor; None: it is below."""
    measured = [(order, metrics.get(f"val/floor/{order}")) for order in ORDERS]
    floors = {order: value for order, value in measured if value is not None}
    main = metrics.get("val/main_loss")
    if main is None or (lowest := smallest_table(main, floors)) is None:
        return None
    floor = floors["trigram"]
    above = [f", nor below the {lowest} floor ({floors[lowest]:.3f}),"] * (lowest != "trigram")
    return (
        f"The main model ({main:.3f} nats per token) is not below the trigram floor ({floor:.3f})"
        f"{''.join(above)} counted from its own training tokens: it has learnt no more than a "
        "table, and these are early-training numbers."
    )
