"""The probe's fit against another optimiser, its floors against sums by hand, and what it must find
where the answer is known.
"""

import numpy as np
import pytest
import scipy
import torch

from dsv3_mtp.analysis.probe import fit, probe, table_losses


def test_the_fit_is_the_optimum_that_scipy_finds():
    random = np.random.default_rng(3)
    x, y = random.normal(size=(60, 3)), random.integers(0, 4, 60)

    def objective(flat: np.ndarray) -> float:
        weights = flat.reshape(4, 4)
        logits = x @ weights[:3] + weights[3]
        loss = scipy.special.logsumexp(logits, axis=1) - logits[np.arange(60), y]
        return loss.mean() + 0.05 * (weights[:3] ** 2).sum()

    best = scipy.optimize.minimize(objective, np.zeros(16), method="BFGS")
    inputs, targets = torch.from_numpy(x), torch.from_numpy(y)
    start = torch.zeros(4, 4, dtype=torch.float64)
    weights, gradient = fit(start, inputs, targets, 0.1)
    assert gradient < 1e-5
    assert objective(weights.numpy().ravel()) == pytest.approx(best.fun, abs=1e-7)


def markov(windows: int, length: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A chain on 6 states, and its tokens."""
    random = np.random.default_rng(7)
    chain = random.random((6, 6)) ** 4
    chain /= chain.sum(1, keepdims=True)
    draws, tokens = np.random.default_rng(seed), np.zeros((windows, length), np.int64)
    for place in range(1, length):
        for row in range(windows):
            tokens[row, place] = draws.choice(6, p=chain[tokens[row, place - 1]])
    return chain, tokens


def test_a_probe_of_the_chains_own_state_reaches_what_the_state_leaves_and_of_noise_the_unigram():
    chain, tokens = markov(160, 33, 1)
    _, others = markov(60, 33, 2)
    states, others_states = np.eye(6)[tokens[:, :32]], np.eye(6)[others[:, :32]]
    found = probe(states, tokens, others_states, others, offset=2, vocab_size=6)
    two = np.linalg.matrix_power(chain, 2)
    exact = -np.log(two[others[:, :29], others[:, 2:31]])
    assert found.probe.shape == exact.shape and found.gradient < 1e-3
    assert float(found.probe.mean()) == pytest.approx(float(exact.mean()), abs=0.01)
    assert float(found.table.mean()) == pytest.approx(float(exact.mean()), abs=0.01)
    assert float(found.unigram.mean()) > float(exact.mean()) + 0.03
    noise = np.random.default_rng(4)
    states, others_states = (noise.normal(size=x.shape) for x in (states, others_states))
    blind = probe(states, tokens, others_states, others, offset=2, vocab_size=6)
    assert float(blind.probe.mean()) == pytest.approx(float(found.unigram.mean()), abs=0.01)


def test_the_floors_are_counts_mixed_by_weights_that_stay_below_one():
    contexts, targets = np.array([[0, 0], [0, 1], [0, 0], [0, 1]]), np.array([[1, 1], [1, 0]] * 2)
    table, unigram = table_losses(contexts, targets, np.array([[0, 2]]), np.array([[1, 2]]), 3)
    assert np.isfinite(table).all() and np.isfinite(unigram).all()
    assert table[0, 0] < unigram[0, 0]  # behind 0 there is always 1
    assert table[0, 1] == pytest.approx(unigram[0, 1])  # a context that was never seen
    assert 0 < np.exp(-unigram[0, 1]) < 1 / 3  # nor was 2: it has what the uniform part leaves
