"""What the examples of every task say, checked by solving them another way; how they fill rows; the
sampler on them.
"""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from dsv3_mtp.config import TASKS
from dsv3_mtp.data.sampler import Sampler, sequential_windows
from dsv3_mtp.study.load import load_study
from dsv3_mtp.tasks.base import TaskSource
from dsv3_mtp.tasks.induction import InductionTask
from dsv3_mtp.tasks.markov import MarkovTask, stationary, transition_matrix
from dsv3_mtp.tasks.polynomial import PolynomialTask
from dsv3_mtp.tasks.star import StarTask
from dsv3_mtp.tasks.suffix_sum import SuffixSumTask

STAR = StarTask(type="star", degree=3, path_length=4, nodes=20)
INDUCTION = InductionTask(type="induction", length=30, names=2, mentions=5)
SUFFIX = SuffixSumTask(type="suffix_sum", terms=4, modulus=3)
POLYNOMIAL = PolynomialTask(type="polynomial", max_operations=4)
MARKOV = MarkovTask(type="markov", states=8)
ALL = [STAR, INDUCTION, SUFFIX, POLYNOMIAL, MARKOV]
assert {task.type for task in ALL} == set(TASKS)  # a new task is listed here
names = pytest.mark.parametrize("task", ALL, ids=lambda task: task.type)
LOOKAHEAD = 3


def examples(task, count=200):
    stream = task.stream(task.example_length - 1, (5, 0))
    return [example for index in range(count) for example in stream.examples(index)]


def test_a_star_graph_is_written_as_in_the_paper_and_its_answer_is_its_only_path():
    bar, equals, slash = 20, 21, 22
    firsts = []
    for example in examples(STAR):
        ((begin, end),) = example.answers
        assert (
            end == len(example.tokens) == STAR.example_length
            and example.tokens[begin - 1] == equals
        )
        cut = example.tokens.index(slash)
        edges = [tuple(group) for group in np.array([*example.tokens[:cut], bar]).reshape(-1, 3)]
        assert {mark for _, _, mark in edges} == {bar}
        start, goal = example.tokens[cut + 1 : begin - 1]
        into = {b: a for a, b, _ in edges}  # every node but the start has one edge into it
        assert len(into) == len(edges) == 9 and start not in into
        path = [goal]
        while path[0] != start:
            path.insert(0, into[path[0]])
        assert example.tokens[begin:end] == path and len(path) == 4
        assert sum(a == start for a, _, _ in edges) == 3
        firsts.append([b for a, b, _ in edges if a == start].index(path[1]))
    assert np.bincount(firsts).min() > 200 / 3 - 4 * 6.7  # the right branch is nowhere special
    reverse = StarTask(**STAR.model_dump() | {"reverse": True})
    for forward, backward in zip(examples(STAR, 5), examples(reverse, 5), strict=True):
        assert (
            forward.tokens[-4:] == backward.tokens[-4:][::-1]
            and forward.tokens[:-4] == backward.tokens[:-4]
        )


def test_the_answers_of_a_story_are_the_second_tokens_of_names_seen_before():
    for example in examples(INDUCTION):
        tokens, named = example.tokens, [i for i, token in enumerate(example.tokens) if token < 16]
        assert len(tokens) == 30 and len(named) == 10 and named[-1] == 29
        mentions = [tuple(tokens[i : i + 2]) for i in named[::2]]
        distinct = set(mentions)
        assert len({token for name in distinct for token in name}) == 2 * len(distinct) <= 4
        seen = [name in mentions[:i] for i, name in enumerate(mentions)]
        assert example.answers == [
            (i + 1, i + 2) for i, known in zip(named[::2], seen, strict=True) if known
        ]
        assert all(16 <= tokens[i] < 32 for i in set(range(30)) - set(named))


def test_every_suffix_sum_is_right_and_all_terms_occur():
    found = set()
    for example in examples(SUFFIX, 600):
        terms, equals, sums = example.tokens[:4], example.tokens[4], example.tokens[5:]
        assert equals == 3 and example.answers == [(5, 9)]
        assert sums == np.cumsum(terms[::-1])[::-1].__mod__(3).tolist()
        found.add(tuple(terms))
    assert len(found) == 81


def test_a_polynomial_is_the_value_of_its_expression_by_numpy():
    counts = np.zeros(5, int)
    for example in examples(POLYNOMIAL, 400):
        ((begin, end),) = example.answers
        rest = list(example.tokens[: begin - 1])
        operators = sum(token >= 7 for token in rest)
        value = [int(c) % 7 for c in evaluate_prefix(rest)]
        assert (
            not rest
            and example.tokens[begin - 1] == 11
            and end == len(example.tokens) <= POLYNOMIAL.example_length
        )
        assert example.tokens[begin:end] == [*value, *[0] * (5 - len(value))]
        assert example.group == operators
        counts[operators] += 1
    assert counts[0] == 0 and counts[1:].min() > 60
    assert (
        max(len(example.tokens) for example in examples(POLYNOMIAL, 400))
        == POLYNOMIAL.example_length
    )


def evaluate_prefix(rest):
    """Coefficients, constant first, of a prefix expression, which is taken from the list."""
    from numpy.polynomial import Polynomial

    def ring(polynomial):
        return Polynomial(np.round(polynomial.coef[:5]) % 7)

    def value():
        if rest[0] < 7:
            leaf = Polynomial(rest[:5])
            del rest[:5]
            return leaf
        operator = rest.pop(0)
        f = value()
        if operator == 7:
            return ring(-f)
        g = value()
        if operator < 10:
            return ring(f + g if operator == 8 else f * g)
        total = Polynomial([0])
        for power, coefficient in enumerate(f.coef):
            term = Polynomial([coefficient])
            for _ in range(power):
                term = ring(term * g)
            total = ring(total + term)
        return total

    return value().coef


def test_a_walk_has_the_transitions_of_its_chain_and_starts_stationary():
    stream = MARKOV.stream(50, (1, 0))
    rows = np.stack([stream.sample(index, 53)[0] for index in range(2000)])
    chain = transition_matrix(8, sharpness=2.0, chain_seed=0)
    pairs = np.zeros((8, 8))
    np.add.at(pairs, (rows[:, :-1], rows[:, 1:]), 1)
    assert np.abs(pairs / pairs.sum(1, keepdims=True) - chain).max() < 0.02
    assert np.abs(np.bincount(rows[:, 0], minlength=8) / 2000 - stationary(chain)).max() < 0.04


@names
def test_a_row_holds_whole_examples_then_padding_and_only_answers_count(task):
    if task.type == "markov":
        tokens, documents, scored = task.stream(20, (1, 0)).sample(0, 20 + LOOKAHEAD)
        assert scored.all() and not documents.any() and tokens.max() < 8
        return
    # three examples and two tokens over
    length, seq_len = task.example_length, 3 * task.example_length + 1
    for loss_on in ("answer", "all"):
        changed = task.model_copy(update={"loss_on": loss_on})
        stream = changed.stream(seq_len, (1, 0))
        row = stream.sample(4, seq_len + LOOKAHEAD)
        tokens, documents, scored = ([], [], [])
        for number, example in enumerate(stream.examples(4)):
            answers = {i for a, b in example.answers for i in range(a, b)}
            tokens += example.tokens
            documents += [number] * len(example.tokens)
            scored += [loss_on == "all" or i in answers for i in range(len(example.tokens))]
        assert number == 2 and len(tokens) <= 3 * length
        padding = seq_len + LOOKAHEAD - len(tokens)
        assert row[0].tolist() == tokens + [task.vocab_size - 1] * padding
        assert row[1].tolist() == documents + [3] * padding
        assert row[2].tolist() == scored + [False] * padding
        assert max(tokens) < task.vocab_size - 1


@names
def test_batches_are_disjoint_over_ranks_independent_of_their_number_and_resumed_bitwise(task):
    def sampler(lookahead=LOOKAHEAD, seed=1):
        return Sampler(
            [TaskSource(task)], seq_len=2 * task.example_length, lookahead=lookahead, seed=seed
        )

    whole = sampler()
    batches = [whole.next_batch(8) for _ in range(3)]
    for world_size in (2, 4):
        ranks = [sampler() for _ in range(world_size)]
        for batch in batches:
            parts = [
                piece
                for rank, own in enumerate(ranks)
                for piece in own.next_batch(8, rank=rank, world_size=world_size, micro_batch_size=2)
            ]
            for together, separate in zip(batch[0], zip(*parts, strict=True), strict=True):
                assert (together == np.concatenate(separate)).all()
    first = sampler()
    first.next_batch(8)
    resumed = sampler()
    resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for part, expected in zip(resumed.next_batch(8)[0], batches[1][0], strict=True):
        assert (part == expected).all()
    seq_len = 2 * task.example_length
    assert (sampler(lookahead=1).next_batch(8)[0][0] == batches[0][0][0][:, : seq_len + 1]).all()
    assert (sampler(seed=2).next_batch(8)[0][0] != batches[0][0][0]).any()


def test_a_position_in_another_task_is_refused():
    state = Sampler([TaskSource(SUFFIX)], seq_len=8, lookahead=2, seed=1).state_dict()
    other = SUFFIX.model_copy(update={"terms": 3})
    with pytest.raises(ValueError, match="belongs to another token stream"):
        Sampler([TaskSource(other)], seq_len=8, lookahead=2, seed=1).load_state_dict(state)


@names
def test_validation_rows_are_fixed_and_not_those_of_training(task):
    source, seq_len = TaskSource(task), task.example_length + 5
    size = {"seq_len": seq_len, "lookahead": LOOKAHEAD, "count": 6}
    (whole,) = sequential_windows(source, **size)
    parts = [
        sequential_windows(source, **size, rank=r, world_size=2, micro_batch_size=2) for r in (0, 1)
    ]
    dealt = [piece for pair in itertools.zip_longest(*parts) for piece in pair if piece is not None]
    for together, separate in zip(whole, zip(*dealt, strict=True), strict=True):
        assert (together == np.concatenate(separate)).all()
    (longer,) = sequential_windows(source, seq_len=seq_len, lookahead=LOOKAHEAD, count=9)
    assert (longer[0][:6] == whole[0]).all()
    training = Sampler([source], seq_len=seq_len, lookahead=LOOKAHEAD, seed=0).next_batch(6)[0]
    assert (training[0] != whole[0]).any(1).sum() >= 5


def graph_of(example, nodes: int):
    """Edges, start and goal: all that the answer depends on."""
    cut = example.tokens.index(nodes + 2)
    edges = frozenset(tuple(example.tokens[n : n + 2]) for n in range(0, cut, 3))
    return edges, *example.tokens[cut + 1 : cut + 3]


@pytest.mark.slow
def test_no_validation_graph_of_the_star_study_is_trained_on():
    study = load_study(Path(__file__).parents[2] / "configs/studies/star.yaml")
    config = study.configs["none"]
    task, rows = config.data.task, config.eval.batches * config.train.micro_batch_size
    held, length = task.stream(config.data.seq_len, None), config.data.seq_len
    graphs = {graph_of(e, task.nodes) for row in range(rows) for e in held.examples(row)}
    assert len(graphs) == 128
    for seed in study.study.seeds[:2]:  # the others were counted once, 4 seconds each
        trained = task.stream(length, (seed, 0))
        for row in range(config.train.total_tokens // length):
            assert not any(graph_of(e, task.nodes) in graphs for e in trained.examples(row)), seed
