"""The floors against counts by hand, and against a source of known entropy."""

from collections import Counter

import numpy as np
import pytest

from dsv3_mtp.data.ngrams import (
    HELD_EVERY,
    ORDERS,
    Counts,
    Events,
    NGrams,
    early_training,
    em,
    floor_metrics,
)
from dsv3_mtp.tasks.markov import step_entropy, transition_matrix

VOCAB = 7


def rows_of(seed: int, rows: int = 120, slots: int = 12) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    tokens = random.zipf(1.6, (rows, slots + 1)) % VOCAB
    documents = np.cumsum(random.random((rows, slots + 1)) < 0.2, axis=1)
    return tokens, documents


def contexts_by_hand(tokens, documents, length):
    """Of every target in order: its context of `length` tokens, None where it is cut off."""
    for row, document in zip(tokens.tolist(), documents.tolist(), strict=True):
        for i in range(len(row) - 1):
            if document[i + 1] != document[i]:
                continue
            inside = i + 1 >= length and all(
                d == document[i] for d in document[i + 1 - length : i + 1]
            )
            yield (tuple(row[i + 1 - length : i + 1]) if inside else None), row[i + 1]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("length", [0, 1, 2])
def test_counts_are_those_by_hand(length: int, masked: bool):
    tokens, documents = rows_of(1)
    other, other_documents = rows_of(2, rows=30)
    if not masked:
        documents, other_documents = np.zeros_like(documents), np.zeros_like(other_documents)
    events = Events.of(tokens, documents if masked else None, VOCAB)
    wanted = Events.of(other, other_documents if masked else None, VOCAB)
    share, seen = Counts(events, length, VOCAB).shares(wanted)
    pairs = Counter(p for p in contexts_by_hand(tokens, documents, length) if p[0] is not None)
    alone = Counter(context for context, _ in pairs.elements())
    expected = list(contexts_by_hand(other, other_documents, length))
    assert len(expected) == len(share)
    for (context, target), found, count in zip(expected, share, seen, strict=True):
        assert count == (alone[context] if context is not None else 0)
        assert found == (pairs[context, target] / alone[context] if count else 0)


def test_em_finds_the_weight_of_highest_likelihood():
    random = np.random.default_rng(3)
    share, lower, seen = random.random(4000), random.random(4000), random.integers(0, 40, 4000)
    share[random.random(4000) < 0.4] = 0
    found = em(share, lower, seen)
    grid = np.linspace(0, 0.999, 1000)[:, None]
    for bucket in range(6):
        chosen = (seen > 0) & (np.log2(np.maximum(seen, 1)).astype(int) == bucket)
        likelihood = np.log(grid * share[chosen] + (1 - grid) * lower[chosen]).sum(1)
        assert found[bucket] == pytest.approx(grid[likelihood.argmax(), 0], abs=0.002)


@pytest.mark.parametrize("masked", [False, True])
def test_every_order_is_a_distribution_over_the_vocabulary(masked: bool):
    tokens, documents = rows_of(4)
    model = NGrams(tokens, documents if masked else None, vocab_size=VOCAB)
    rows = np.random.default_rng(5).integers(VOCAB, size=(20, 4))
    totals = np.zeros((len(ORDERS), 20))
    for last in range(VOCAB):  # every continuation of each row's context
        rows[:, -1] = last
        events = Events.of(rows, None, VOCAB)
        totals += np.array([p.reshape(20, 3)[:, -1] for p in model.probabilities(events)])
    np.testing.assert_allclose(totals, 1.0, atol=1e-12)


def test_the_floor_of_the_true_order_converges_to_the_entropy():
    chain = transition_matrix(16, sharpness=1.5, chain_seed=1)
    random, edges = np.random.default_rng(6), chain.cumsum(1)

    def walks(rows: int, slots: int = 64) -> np.ndarray:
        tokens = np.zeros((rows, slots + 1), np.int64)
        tokens[:, 0] = random.integers(16, size=rows)
        for i in range(slots):
            tokens[:, i + 1] = (edges[tokens[:, i]] < random.random((rows, 1))).sum(1)
        return tokens

    held, entropy = walks(2000), step_entropy(chain, 1)
    errors = {}
    for rows in (20, 200, 4000):
        losses = NGrams(walks(rows), None, vocab_size=16).losses(held, None)
        errors[rows] = losses["bigram"] - entropy
        assert losses["unigram"] > entropy + 0.3
        assert losses["trigram"] > losses["bigram"] - 0.005  # there is nothing more to know
    assert errors[20] > errors[200] > errors[4000] > -0.005
    assert errors[4000] < 0.005
    # Expected excess of counts: (V - 1) / 2 per context, of V contexts.
    assert errors[200] < 2 * 16 * 15 / 2 / (200 * 64)


def test_rows_that_are_held_out_find_the_weights_and_are_counted_too():
    tokens = np.zeros((2 * HELD_EVERY, 5), np.int64)
    tokens[HELD_EVERY // 2] = 3  # only in a row that is held out
    losses = NGrams(tokens, None, vocab_size=4).losses(np.full((1, 5), 3), None)
    assert losses["bigram"] < np.log(4)
    with pytest.raises(ValueError, match="at least 2 rows"):
        NGrams(tokens[:1], None, vocab_size=4)


def test_a_model_above_the_trigram_floor_is_called_early():
    metrics = floor_metrics({"unigram": 5.0, "bigram": 4.0, "trigram": 3.5}, 0.5)
    assert metrics["val/floor/trigram"] == 3.5
    assert metrics["val/floor/trigram_bits_per_byte"] == 1.75
    assert "early-training" in (early_training(metrics | {"val/main_loss": 3.5}) or "")
    assert early_training(metrics | {"val/main_loss": 3.49}) is None
    for main, lower in ((3.9, None), (4.5, "bigram floor (4.000)"), (6.0, "unigram floor (5.000)")):
        text = early_training(metrics | {"val/main_loss": main}) or ""
        assert "not below the trigram floor (3.500)" in text
        assert (f", nor below the {lower}, counted" in text) == (lower is not None), text
    assert early_training({"val/main_loss": 9.0}) is None
