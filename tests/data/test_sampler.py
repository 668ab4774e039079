import json
import math

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dsv3_mtp.data.sampler import Sampler, sequential_windows, spare_windows
from dsv3_mtp.data.source import open_source

lengths_strategy = st.lists(st.integers(1, 40), min_size=1, max_size=12)
fast = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def rows(batches):
    """(tokens, documents) of all micro-batches, one below the other."""
    return tuple(np.concatenate(part) for part in zip(*batches, strict=True))


@fast
@given(
    lengths=lengths_strategy,
    seq_len=st.integers(1, 50),
    lookahead=st.integers(1, 4),
    seed=st.integers(0, 9),
)
def test_an_epoch_is_every_token_once_in_touching_windows(
    make_source, lengths, seq_len, lookahead, seed
):
    source = make_source(lengths)  # token ids 0 .. N-1, each once
    n, epochs = source.tokens, 3
    sampler = Sampler([source], seq_len=seq_len, lookahead=lookahead, seed=seed)
    stream = sampler._streams[0].span(0, (epochs + 1) * n + 2 * seq_len + lookahead)[0]
    for epoch in range(epochs):
        assert sorted(stream[epoch * n : (epoch + 1) * n]) == list(range(n))
    end = 0
    for epoch in range(epochs):
        # the windows that start in this epoch
        begin, end = end, math.ceil((epoch + 1) * n / seq_len)
        delivered = [tuple(sampler.next_batch(1)[0][0][0]) for _ in range(begin, end)]
        expected = [
            tuple(stream[w * seq_len : (w + 1) * seq_len + lookahead]) for w in range(begin, end)
        ]
        assert sorted(delivered) == sorted(expected)


@settings(fast, max_examples=15)
@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=6), seq_len=st.integers(1, 20))
def test_every_token_is_a_main_input_equally_often_and_a_target_too(make_source, lengths, seq_len):
    source = make_source(lengths)
    sampler = Sampler([source], seq_len=seq_len, lookahead=1, seed=3)
    # N samples of T tokens are T epochs, in whatever order their windows come.
    rows = np.stack([sampler.next_batch(1)[0][0][0] for _ in range(source.tokens)])
    inputs, targets = np.bincount(rows[:, :-1].ravel()), np.bincount(rows[:, 1:].ravel())
    assert (inputs == seq_len).all()
    # As targets, the stream's very first token is missing and the first one of the next epoch is
    # there.
    assert np.abs(targets - inputs).sum() in (0, 2)


@pytest.mark.parametrize(
    "then", [{"batch_size": 6}, {"batch_size": 9}, {"batch_size": 6, "micro_batch_size": 2}]
)
def test_a_prepared_batch_changes_neither_the_position_nor_what_comes_next(make_source, then):
    plain, ahead = (
        Sampler(
            [make_source([7] * 30), make_source([9] * 20)], [2, 1], seq_len=5, lookahead=2, seed=1
        )
        for _ in range(2)
    )
    share = {"rank": 1, "world_size": 3}
    plain.next_batch(3)
    ahead.next_batch(3)
    state = ahead.state_dict()
    ahead.prepare(6, **share)
    assert ahead.state_dict() == state == plain.state_dict()
    for arguments in ({**share, **then}, {"batch_size": 4}):
        for ours, theirs in zip(
            ahead.next_batch(**arguments), plain.next_batch(**arguments), strict=True
        ):
            assert all(map(np.array_equal, ours, theirs))
    assert ahead.state_dict() == plain.state_dict()


def test_epochs_and_seeds_shuffle_differently_and_batches_mix_documents(make_source):
    source = make_source([50] * 40)
    orders = []
    for seed in (0, 1):
        sampler = Sampler([source], seq_len=50, lookahead=1, seed=seed)
        orders += [rows(sampler.next_batch(40))[0][:, 0].tolist() for _ in range(2)]
    assert len({tuple(order) for order in orders}) == 4
    assert all(sorted(order) == list(range(0, 2000, 50)) for order in orders)


@fast
@given(lengths=lengths_strategy, seq_len=st.integers(1, 60), lookahead=st.integers(0, 3))
def test_documents_rise_by_one_exactly_at_borders(make_source, lengths, seq_len, lookahead):
    source = make_source(lengths)
    sampler = Sampler([source], seq_len=seq_len, lookahead=lookahead, seed=0)
    first = source.document_starts[:-1]
    for _ in range(5):
        ((tokens, documents),) = sampler.next_batch(3)
        assert tokens.shape == documents.shape == (3, seq_len + lookahead)
        assert tokens.dtype == documents.dtype == np.int64
        assert (documents[:, 0] == 0).all()
        assert np.array_equal(np.diff(documents, axis=1), np.isin(tokens[:, 1:], first).astype(int))


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_the_global_batch_does_not_depend_on_ranks_or_micro_batches(make_source, world_size):
    sources = [make_source([7, 30, 12, 5]), make_source([40, 3])]

    def sampler() -> Sampler:
        return Sampler(sources, [2, 1], seq_len=8, lookahead=2, seed=1)

    alone, ranks = sampler(), [sampler() for _ in range(world_size)]
    for _ in range(4):
        whole = rows(alone.next_batch(24))
        parts = [
            ranks[r].next_batch(24, rank=r, world_size=world_size, micro_batch_size=2)
            for r in range(world_size)
        ]
        assert all(len(part) == 24 // world_size // 2 for part in parts)
        for got, expected in zip(
            rows([batch for part in parts for batch in part]), whole, strict=True
        ):
            assert np.array_equal(got, expected)
    assert all(rank.state_dict() == alone.state_dict() for rank in ranks)


@fast
@given(
    before=st.lists(st.integers(1, 9), max_size=6),
    lookahead=st.integers(0, 3),
    weights=st.lists(st.floats(0.1, 5), min_size=2, max_size=2),
)
def test_resuming_anywhere_continues_the_stream(make_source, before, lookahead, weights):
    sources = [make_source([5, 9, 30]), make_source([4])]
    whole = Sampler(sources, weights, seq_len=6, lookahead=2, seed=5)
    for size in before:
        whole.next_batch(size)
    resumed = Sampler(sources, weights, seq_len=6, lookahead=lookahead, seed=5)
    resumed.load_state_dict(json.loads(json.dumps(whole.state_dict())))
    for _ in range(3):
        shared = 6 + min(2, lookahead)
        ours, theirs = rows(resumed.next_batch(4)), rows(whole.next_batch(4))
        for a, b in zip(ours, theirs, strict=True):
            assert np.array_equal(a[:, :shared], b[:, :shared])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "seed: saved 0, now 1"),
        ({"seq_len": 4}, "seq_len: saved 8, now 4"),
        ({"weights": [1, 2]}, "weights: saved"),
        ({"other": True}, "sources: saved"),
    ],
)
def test_the_state_of_another_stream_is_refused(make_source, change, message):
    sources = [make_source([9, 8]), make_source([7])]
    state = Sampler(sources, [1, 1], seq_len=8, lookahead=1, seed=0).state_dict()
    if change.pop("other", False):
        sources = [sources[0], make_source([6])]
    options = {"weights": [1, 1], "seq_len": 8, "lookahead": 1, "seed": 0} | change
    sampler = Sampler(sources, options.pop("weights"), **options)
    with pytest.raises(ValueError, match=message) as caught:
        sampler.load_state_dict(state)
    assert "restore these settings, or start a new run" in str(caught.value)


@fast
@given(weights=st.lists(st.floats(0.01, 10), min_size=2, max_size=6))
def test_weights_hold_at_every_moment(make_source, weights):
    source = make_source([5])
    sampler = Sampler([source] * len(weights), weights, seq_len=2, lookahead=1, seed=0)
    share = np.array(weights) / sum(weights)
    for samples in range(1, 200):
        sampler._pick()
        assert sum(sampler.counts) == samples
        assert np.abs(np.array(sampler.counts) - share * samples).max() <= 1 + math.log(
            len(weights)
        )


@pytest.mark.parametrize(
    "arguments",
    [
        {"batch_size": 6, "world_size": 4},
        {"batch_size": 6, "micro_batch_size": 4},
        {"batch_size": 0},
    ],
)
def test_a_batch_that_does_not_divide_is_refused(make_source, arguments):
    sampler = Sampler([make_source([9])], seq_len=2, lookahead=1, seed=0)
    with pytest.raises(ValueError, match=r"does not divide.*make it a multiple of"):
        sampler.next_batch(**arguments)
    assert sampler.samples == 0


@pytest.mark.parametrize("weights", [[1.0], [1.0, 0.0], [1.0, -1.0]])
def test_weights_that_do_not_fit_the_sources_are_refused(make_source, weights):
    with pytest.raises(ValueError, match="one weight > 0 per source"):
        Sampler([make_source([3])] * 2, weights, seq_len=2, lookahead=1, seed=0)


def test_one_token_makes_windows(make_source):
    sampler = Sampler([make_source([1])], seq_len=5, lookahead=2, seed=0)
    ((tokens, documents),) = sampler.next_batch(2)
    assert tokens.tolist() == [[0] * 7] * 2
    assert documents.tolist() == [list(range(7))] * 2


def test_validation_windows_are_fixed_spread_and_in_order(make_source):
    source = make_source([30, 70, 1])  # tokens 0 .. 100: 10 windows of 10 with all targets
    ((tokens, documents),) = sequential_windows(source, seq_len=10, lookahead=2, count=5)
    assert tokens[:, 0].tolist() == [0, 20, 40, 60, 80]
    assert np.array_equal(tokens, tokens[:, :1] + np.arange(12))
    assert documents[1].tolist() == [0] * 10 + [1] * 2
    ((last, marks),) = sequential_windows(source, seq_len=10, lookahead=3, count=10)
    assert last[-1].tolist() == [
        *range(90, 101),
        0,
        1,
    ]  # the lookahead runs on into the first document
    assert marks[-1].tolist() == [0] * 10 + [1, 2, 2]


@pytest.mark.parametrize("count", [1, 7, 16])
def test_validation_windows_do_not_depend_on_ranks_or_lookahead(make_source, count):
    source = make_source([30, 71])
    whole = rows(sequential_windows(source, seq_len=10, lookahead=3, count=count))[0]
    assert len(whole) == count
    for world_size in (1, 2, 3):
        parts = []
        for rank in range(world_size):
            place = {"rank": rank, "world_size": world_size, "micro_batch_size": 2}
            parts += sequential_windows(source, seq_len=10, lookahead=1, count=count, **place)
        got = sorted(rows(parts)[0].tolist())
        assert got == sorted(whole[:, :11].tolist())


def test_validation_works_on_less_than_a_window(make_source):
    ((tokens, documents),) = sequential_windows(make_source([3]), seq_len=5, lookahead=1, count=1)
    assert tokens.tolist() == [[0, 1, 2, 0, 1, 2]]
    assert documents.tolist() == [[0, 0, 0, 1, 1, 1]]


def test_a_prepared_folder_is_sampled_whole(pystdlib):
    source = open_source(pystdlib, "val")
    sampler = Sampler([source], seq_len=512, lookahead=1, seed=0)
    inputs = np.concatenate(
        [rows(sampler.next_batch(1))[0][0, :512] for _ in range(math.ceil(source.tokens / 512))]
    )
    corpus = source.read(0, source.tokens)
    assert (
        np.abs(np.bincount(inputs, minlength=512) - np.bincount(corpus, minlength=512)).sum() < 512
    )


@fast
@given(lengths=lengths_strategy, seq_len=st.integers(1, 50), batches=st.integers(1, 90))
def test_consumed_rows_have_every_token_once_and_of_one_epoch_at_most(
    make_source, lengths, seq_len, batches
):
    source = make_source(lengths)  # token ids 0 .. N-1, each once
    sampler = Sampler([source], seq_len=seq_len, lookahead=3, seed=4)
    given_rows = np.concatenate([sampler.next_batch(1)[0][0] for _ in range(batches)])
    tokens, documents = sampler.consumed()
    assert tokens.shape == documents.shape == (len(tokens), seq_len + 1)
    first = math.ceil(source.tokens / seq_len)
    assert np.array_equal(tokens, given_rows[:first, : seq_len + 1])
    inputs = np.bincount(tokens[:, :-1].ravel(), minlength=source.tokens)
    # Only the window across the epoch's end has tokens of the next epoch beside its own.
    assert (inputs > 1).sum() < seq_len
    assert batches < first or (inputs > 0).all()


@given(lengths=lengths_strategy, seq_len=st.integers(1, 9), count=st.integers(1, 9))
@settings(fast, max_examples=60)
def test_spare_windows_share_no_input_with_those_of_the_validation(
    make_source, lengths, seq_len, count
):
    source = make_source(lengths)
    windows = {"seq_len": seq_len, "lookahead": 1, "count": count}
    used = set(sequential_windows(source, **windows)[0][0][:, :-1].ravel())
    for most in (1, 5, 1000):
        tokens, documents = spare_windows(source, **windows, most=most)
        assert tokens.shape == documents.shape and len(tokens) <= most
        inputs = tokens[:, :-1].ravel().tolist()
        assert len(set(inputs)) == len(inputs) and used.isdisjoint(inputs)
    available = max((source.tokens - 1) // seq_len, 1)
    assert len(tokens) == available - len({i * available // count for i in range(count)})
