"""Truncation, and the verifier: greedy prefixes, and speculative sampling that keeps the main
model's distribution.
"""

import pytest
import torch

from dsv3_mtp.decode.sample import DraftSampler, TokenSampler, agreeing, largest


def chi_square_p(counts: torch.Tensor, probability: torch.Tensor) -> float:
    """p-value of Pearson's test; cells expected fewer than 5 times are merged; impossible cells
    must be empty.
    """
    assert counts[probability == 0].sum() == 0
    expected = probability.double() * counts.sum()
    order = expected.argsort(descending=True)
    counts, expected = counts.double()[order], expected[order]
    large = int((expected >= 5).sum())
    counts = torch.cat([counts[:large], counts[large:].sum()[None]])
    expected = torch.cat([expected[:large], expected[large:].sum()[None]])
    counts, expected = counts[expected > 0], expected[expected > 0]
    statistic = ((counts - expected) ** 2 / expected).sum()
    half = torch.tensor((len(counts) - 1) / 2, dtype=torch.float64)
    return torch.special.gammaincc(half, statistic / 2).item() if len(counts) > 1 else 1.0


def seeded(**settings) -> TokenSampler:
    return TokenSampler(
        generator=torch.Generator().manual_seed(0), **{"temperature": 1.0, **settings}
    )


@pytest.mark.parametrize(
    ("accepted", "drafts"), [(0, [9, 2, 3]), (1, [1, 9, 3]), (2, [1, 2, 9]), (3, [1, 2, 3])]
)
def test_greedy_keeps_the_longest_agreeing_prefix_and_the_token_after_it(accepted, drafts):
    assert agreeing([1, 2, 3, 4], drafts) == accepted


def test_fewer_drafts_than_there_could_be_and_a_match_behind_a_rejection_do_not_count():
    assert agreeing([1, 2, 3], [9, 2]) == 0
    assert agreeing([1, 2, 3], [1]) == 1
    assert agreeing([1, 2, 3], []) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("vocab", [1, 5, 16, 67, 2048])
def test_the_most_likely_token_is_the_first_of_the_largest(dtype, vocab):
    logits = (torch.randn(7, vocab) * 4).to(dtype)
    logits[0] = 0.0
    logits[1, -1] = logits[1].max()  # a tie, but for one token
    logits[2] -= 1000.0
    logits[3, : vocab // 2] = float("-inf")
    for given in (logits, logits.repeat(1, 2)[:, :vocab]):  # the second is not contiguous
        assert largest(given).tolist() == logits.argmax(-1).tolist()


def test_truncation_by_hand():
    logits = torch.tensor([0.1, 0.4, 0.2, 0.3]).log()
    close = torch.testing.assert_close
    close(seeded(top_k=2).probabilities(logits), torch.tensor([0, 4 / 7, 0, 3 / 7]))
    close(seeded(top_p=0.65).probabilities(logits), torch.tensor([0, 4 / 7, 0, 3 / 7]))
    close(seeded(top_p=0.75).probabilities(logits), torch.tensor([0, 4 / 9, 2 / 9, 3 / 9]))
    close(seeded(top_p=1e-6).probabilities(logits), torch.tensor([0.0, 1.0, 0, 0]))
    close(
        seeded(temperature=0.5).probabilities(logits), torch.tensor([0.01, 0.16, 0.04, 0.09]) / 0.3
    )
    close(seeded(top_k=3, top_p=0.5).probabilities(logits), torch.tensor([0, 4 / 7, 0, 3 / 7]))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.6},
        {"top_k": 3},
        {"top_p": 0.8},
        {"temperature": 1.5, "top_k": 5, "top_p": 0.9},
    ],
    ids=str,
)
def test_speculative_sampling_has_the_main_models_distribution(settings):
    """Chi-square of each token that two drafts and the token after them can give, in every context
    of earlier ones.
    """
    sampler, rows, vocab = seeded(**settings), 60_000, 6
    generator = torch.Generator().manual_seed(1)
    # by earlier tokens
    p_logits = [torch.randn(*[vocab] * k, vocab, generator=generator) * 1.5 for k in range(3)]
    q_logits = [torch.randn(*[vocab] * k, vocab, generator=generator) * 1.5 for k in range(2)]
    drafts, q = [], []
    for k in range(2):
        drawn, probability = sampler.draw(q_logits[k][tuple(drafts)].expand(rows, vocab))
        drafts.append(drawn)
        q.append(probability)
    target = torch.stack([p_logits[k][tuple(drafts[:k])].expand(rows, vocab) for k in range(3)], 1)
    accepted, following = sampler.verify(target, torch.stack(drafts, 1), torch.stack(q, 1))
    assert set(accepted.tolist()) == {0, 1, 2}
    p = [sampler.probabilities(logits) for logits in p_logits]
    tokens = [
        drafts[0].where(accepted > 0, following),
        drafts[1].where(accepted > 1, following),
        following,
    ]
    for first in (1, 2, 3):  # the token that is tested, given those before it
        rows_with = accepted >= first - 1  # rows that emitted token `first`
        index = sum(tokens[k][rows_with] * vocab ** (first - 1 - k) for k in range(first))
        counts = torch.bincount(index, minlength=vocab**first)
        # Given the earlier tokens, whether a row gets this far does not depend on what it emits
        # next.
        previous = counts.view(-1, vocab).sum(1)
        for context, total in enumerate(previous.tolist()):
            if total > 200:
                conditional = p[first - 1].reshape(-1, vocab)[context]
                assert chi_square_p(counts.view(-1, vocab)[context], conditional) > 1e-4


def test_the_chi_square_test_sees_a_wrong_verifier():
    """Accepting without the correction of (p - q)+ is found out with the same number of samples."""
    sampler = seeded()
    p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.3, 0.5])
    drafts, _ = sampler.draw(q.log().expand(60_000, 3))
    coin = torch.rand(60_000, generator=sampler.generator)
    wrong = torch.where(coin < p[drafts] / q[drafts], drafts, sampler.pick(p.expand(60_000, 3)))
    assert chi_square_p(torch.bincount(wrong, minlength=3), p) < 1e-12
    right = seeded().pick(p.expand(60_000, 3))
    assert chi_square_p(torch.bincount(right, minlength=3), p) > 1e-3


@pytest.mark.parametrize("rule", ["top probability", "confidence", "the draft itself"])
def test_a_stop_is_lossless_unless_it_looks_at_the_draft_that_it_drops(rule):
    """Drafts end before depth k where q_k is unsure. The token in that place comes from p, whatever
    d_k would have been; a rule that drops unlikely drafts takes them out of the output.
    """
    rows, vocab, wrong = 60_000, 4, rule == "the draft itself"
    q = torch.tensor([[0.9, 0.1, 0, 0], [0.4, 0.3, 0.2, 0.1]])[torch.arange(rows) % 2]
    p = torch.tensor([0.5, 0.2, 0.2, 0.1])
    # any function of what is known before
    confidence = 2 * q[:, 1] if rule == "confidence" else None
    draws = DraftSampler(seeded(), threshold=0.0 if wrong else 0.5)
    drawn = [draws.draw(q.log(), confidence) for _ in range(2)]
    drafts, probability = (torch.stack(part, 1) for part in zip(*drawn, strict=True))
    lengths = draws.lengths
    if wrong:
        lengths = (probability.gather(2, drafts[..., None])[..., 0] > 0.25).cumprod(1).sum(1)
    assert lengths is not None and len(lengths.unique()) > 1 - wrong
    accepted, following = seeded().verify(p.log().expand(rows, 3, -1), drafts, probability, lengths)
    assert (accepted <= lengths).all() and accepted.max() == 2
    first = drafts[:, 0].where(accepted > 0, following)
    found = chi_square_p(torch.bincount(first, minlength=vocab), p)
    assert found < 1e-12 if wrong else found > 1e-3


def test_drafts_stop_where_the_head_is_unsure_and_stay_in_their_vocabulary():
    logits = torch.tensor([[0.6, 0.3, 0.1], [0.5, 0.1, 0.4]]).log()
    draws = DraftSampler(TokenSampler(), threshold=0.55)
    for _ in range(2):
        draws.draw(logits)
    assert draws.lengths.tolist() == [2, 0] and not draws.ended
    draws.draw(logits.flip(0))  # one that has stopped does not go on
    assert draws.lengths.tolist() == [2, 0] and draws.ended
    narrow = DraftSampler(seeded(), among=torch.tensor([1, 2]), vocab=3)
    tokens, probability = narrow.draw(logits[:, 1:])
    assert (tokens > 0).all()
    torch.testing.assert_close(probability, torch.tensor([[0, 0.75, 0.25], [0, 0.2, 0.8]]))
    assert narrow.lengths is None and not narrow.ended


def test_equal_distributions_accept_everything():
    logits = torch.randn(1, 1, 50).expand(500, 3, 50)
    sampler = seeded(top_p=0.9)
    pairs = [sampler.draw(logits[:, k]) for k in range(2)]
    drafts, q = torch.stack([d for d, _ in pairs], 1), torch.stack([p for _, p in pairs], 1)
    accepted, _ = sampler.verify(logits, drafts, q)
    assert accepted.tolist() == [2] * 500
