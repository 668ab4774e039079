"""The closed forms of a Markov source against enumeration of every path, and against simulated
drafting.
"""

import itertools
import math

import numpy as np
import pytest

from dsv3_mtp.tasks.markov import (
    best_acceptance,
    best_agreement,
    source_nll,
    stationary,
    step_entropy,
    transition_matrix,
)

CHAIN = transition_matrix(4, sharpness=1.5, chain_seed=3)
DEPTHS = 3
# of heads that see only t_i: what they predict, where, and what they draft
HEADS = [np.linalg.matrix_power(CHAIN, 1 + k) for k in range(1, 1 + DEPTHS)]
OFFSETS = [1 + k for k in range(1, 1 + DEPTHS)]
GREEDY = [head.argmax(1) for head in HEADS]


def test_the_matrix_is_a_function_of_its_settings_with_rows_that_sum_to_one():
    assert np.allclose(CHAIN.sum(1), 1) and (CHAIN > 0).all()
    assert (transition_matrix(4, sharpness=1.5, chain_seed=3) == CHAIN).all()
    assert not np.allclose(transition_matrix(4, sharpness=1.5, chain_seed=4), CHAIN)
    assert np.allclose(transition_matrix(4, sharpness=0, chain_seed=3), 1 / 4)
    logits = np.log(transition_matrix(400, sharpness=2.0, chain_seed=0))
    assert (logits - logits.mean(1, keepdims=True)).std() == pytest.approx(2.0, rel=0.01)


def test_the_two_state_chain_has_its_textbook_answers():
    chain = np.array([[0.9, 0.1], [0.4, 0.6]])
    assert stationary(chain) == pytest.approx([0.8, 0.2])
    entropy = [-sum(p * math.log(p) for p in row) for row in chain]
    assert step_entropy(chain, 1) == pytest.approx(0.8 * entropy[0] + 0.2 * entropy[1])
    # P^2 = [[.85, .15], [.6, .4]]: the best guess two steps ahead is state 0 from both
    assert best_agreement(chain, [chain @ chain], [2]) == pytest.approx([0.8 * 0.9 + 0.2 * 0.4])
    # greedy: 0 goes on with 0 and 0, 1 with 1 and 1, and the head drafts 0
    assert best_acceptance(
        chain, [chain @ chain], [np.array([0, 0])], temperature=0
    ) == pytest.approx([0.8])


def paths():
    """Every path t_0 .. t_{D+1} of a stationary text and its probability."""
    pi = stationary(CHAIN)
    for path in itertools.product(range(len(CHAIN)), repeat=DEPTHS + 2):
        yield path, pi[path[0]] * math.prod(CHAIN[a, b] for a, b in itertools.pairwise(path))


def powers(path):
    """For each depth the distribution that a head which sees only t_0 has of t_{k+1}."""
    return [np.linalg.matrix_power(CHAIN, 1 + k)[path[0]] for k in range(1, 1 + DEPTHS)]


def test_entropies_equal_their_sum_over_every_path():
    for steps in range(1, 1 + DEPTHS):
        power = np.linalg.matrix_power(CHAIN, steps)
        brute = -sum(p * math.log(power[path[0], path[steps]]) for path, p in paths())
        assert step_entropy(CHAIN, steps) == pytest.approx(brute)
    assert step_entropy(CHAIN, 2000) == pytest.approx(
        -(stationary(CHAIN) @ np.log(stationary(CHAIN)))
    )


def test_agreement_equals_its_sum_over_every_path():
    brute = [0.0] * DEPTHS
    for path, p in paths():
        same = [powers(path)[k].argmax() == CHAIN[path[k + 1]].argmax() for k in range(DEPTHS)]
        for k in range(DEPTHS):
            brute[k] += p * all(same[: k + 1])
    assert best_agreement(CHAIN, HEADS, OFFSETS) == pytest.approx(brute)
    assert 0 < brute[-1] < brute[0] < 1


def test_greedy_acceptance_equals_drafting_from_every_state():
    brute = [0.0] * DEPTHS
    for state, p in enumerate(stationary(CHAIN)):
        token, stands = CHAIN[state].argmax(), True
        for k in range(DEPTHS):
            draft = np.linalg.matrix_power(CHAIN, 2 + k)[state].argmax()
            stands = stands and CHAIN[token].argmax() == draft
            brute[k] += p * stands
            token = draft
    assert best_acceptance(CHAIN, HEADS, GREEDY, temperature=0) == pytest.approx(brute)


def test_acceptance_at_temperature_1_equals_its_sum_over_every_draft():
    brute = [0.0] * DEPTHS
    pi = stationary(CHAIN)
    for state, token, *drafts in itertools.product(range(len(CHAIN)), repeat=2 + DEPTHS):
        weight, before = pi[state] * CHAIN[state, token], token
        for k, draft in enumerate(drafts):
            q, p = np.linalg.matrix_power(CHAIN, 2 + k)[state, draft], CHAIN[before, draft]
            weight *= q * min(1, p / q)  # drawn, and accepted
            # of the later drafts every one is enumerated
            brute[k] += weight / len(CHAIN) ** (DEPTHS - 1 - k)
            before = draft
    assert best_acceptance(CHAIN, HEADS, GREEDY, temperature=1) == pytest.approx(brute)


def test_acceptance_is_known_at_two_temperatures():
    with pytest.raises(ValueError, match="temperature must be 0 or 1"):
        best_acceptance(CHAIN, HEADS, GREEDY, temperature=2)


def test_acceptance_at_temperature_1_is_that_of_the_decoder_s_own_verification():
    """decode.sample.Sampler on the source's probabilities, as the main head and parallel heads
    would give them.
    """
    import torch

    from dsv3_mtp.decode.sample import TokenSampler

    rows, depths = 20_000, 2
    walk = torch.Generator().manual_seed(0)
    chain = torch.from_numpy(CHAIN)
    state = torch.multinomial(
        torch.from_numpy(stationary(CHAIN)), rows, replacement=True, generator=walk
    )
    token = torch.multinomial(chain[state], 1, generator=walk).squeeze(1)
    # (B, K, V)
    q = torch.stack([torch.linalg.matrix_power(chain, 2 + k)[state] for k in range(depths)], 1)
    drafts = torch.stack(
        [torch.multinomial(q[:, k], 1, generator=walk).squeeze(1) for k in range(depths)], 1
    )
    logits = torch.log(chain[torch.cat([token[:, None], drafts], 1)])  # (B, 1+K, V)
    accepted, _ = TokenSampler(1.0, None, 1.0, walk).verify(logits.float(), drafts, q.float())
    measured = [(accepted > k).double().mean().item() for k in range(depths)]
    expected = best_acceptance(CHAIN, HEADS[:depths], GREEDY[:depths], temperature=1)
    # four standard errors
    assert measured == pytest.approx(expected, abs=4 * 0.5 / math.sqrt(rows))


def test_the_source_loses_its_entropy_on_its_own_text():
    rng = np.random.default_rng(0)
    walk = [0]
    for draw in rng.random(20_000):
        walk.append(int(np.searchsorted(CHAIN[walk[-1]].cumsum()[:-1], draw)))
    tokens = np.array(walk)
    for steps in (1, 2):
        head = np.linalg.matrix_power(CHAIN, steps)
        mean = source_nll(head, tokens[:-steps], tokens[steps:]) / (len(tokens) - steps)
        assert mean == pytest.approx(step_entropy(CHAIN, steps), abs=0.02)
