"""What counts as solved: hand-made generations, the loss of the true source, and real runs on
tasks.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from dsv3_mtp.config import MTPConfig
from dsv3_mtp.data.opening import validation_source
from dsv3_mtp.data.sampler import Sampler
from dsv3_mtp.decode.generate import Settings, generate
from dsv3_mtp.hf import export_hf
from dsv3_mtp.tasks import base
from dsv3_mtp.tasks.base import TaskSource
from dsv3_mtp.tasks.markov import MarkovTask, step_entropy, transition_matrix
from dsv3_mtp.tasks.polynomial import PolynomialTask
from dsv3_mtp.tasks.star import StarTask
from dsv3_mtp.train.validation import acceptance, open_model, validate
from tests.conftest import short_run
from tests.ranks import timeless, train_until, trained

SUFFIX = {"type": "suffix_sum", "terms": 3, "modulus": 3}
STAR = StarTask(type="star", degree=2, path_length=3, nodes=10)


def graded(monkeypatch, task, answer, *, rows=20):
    """The metrics of a model that answers `answer(example number, true answer)`."""
    stream = task.stream(task.example_length - 1, None)
    true = {
        tuple(e.tokens[:a]): e.tokens[a:b]
        for row in range(rows)
        for e in stream.examples(row)
        for a, b in e.answers
    }
    number = {prompt: i for i, prompt in enumerate(true)}

    def generate(prompts, tokens):
        given = [answer(number[tuple(prompt)], list(true[tuple(prompt)])) for prompt in prompts]
        assert all(len(one) <= tokens for one in given)
        return given

    monkeypatch.setattr(base, "ROWS", 7)  # several calls
    grade = task.grading(task.example_length - 1, MTPConfig(mode="none"), generate)
    grade.mark(range(rows), [])
    return grade.metrics(grade.sums.tolist(), {})


@pytest.mark.parametrize("reverse", [False, True])
def test_one_wrong_token_is_no_exact_match_and_the_first_node_is_counted_alone(
    monkeypatch, reverse
):
    task = STAR.model_copy(update={"reverse": reverse})
    place = 1  # of three nodes the one between start and goal, from both ends

    def answer(number, true):
        if number < 8:
            true[place if number < 5 else 2] += 1
        return true

    found = graded(monkeypatch, task, answer)
    assert found == {"task/exact_match": 12 / 20, "task/first_node": 15 / 20}
    longer = StarTask(type="star", path_length=5, nodes=20, reverse=reverse)
    assert longer.hard_token == (3 if reverse else 1)


def test_polynomials_are_also_counted_by_their_number_of_operations(monkeypatch):
    task = PolynomialTask(type="polynomial", max_operations=3)
    stream = task.stream(task.example_length - 1, None)
    groups = [stream.examples(row)[0].group for row in range(20)]
    found = graded(
        monkeypatch, task, lambda number, true: true if groups[number] == 2 else [true[0], 9]
    )
    assert found == {
        "task/exact_match": groups.count(2) / 20,
        "task/exact_match/1": 0,
        "task/exact_match/2": 1,
        "task/exact_match/3": 0,
    }


@pytest.mark.parametrize(
    ("mtp", "sees"),
    [
        ({"mode": "sequential"}, True),
        ({"mode": "sequential", "embed": False}, False),
        ({"mode": "parallel"}, False),
    ],
)
def test_the_true_source_has_no_excess_loss_at_any_depth(mtp, sees):
    task, depths = MarkovTask(type="markov", states=8), 2
    chain = transition_matrix(8, sharpness=2.0, chain_seed=0)
    mtp = MTPConfig(num_nextn_predict_layers=depths, **mtp)
    assert mtp.reads_tokens == sees
    grade = task.grading(64, mtp, lambda prompts, tokens: [])
    window = Sampler([TaskSource(task)], seq_len=64, lookahead=1 + depths, seed=0).next_batch(256)[
        0
    ]
    grade.mark([], [window])
    # by the definition of depth k: slot i predicts t_{i+k+1}, from t_{i+k} or from t_i
    tokens, losses = window[0], []
    for k in range(1 + depths):
        steps = 1 if sees else 1 + k
        power = np.linalg.matrix_power(chain, steps)
        nll = [
            -np.log(power[row[i + k + 1 - steps], row[i + k + 1]])
            for row in tokens
            for i in range(64)
        ]
        losses.append(float(np.mean(nll)))
        assert losses[-1] == pytest.approx(step_entropy(chain, steps), abs=0.05)
    names = ["val/main_loss", "val/mtp_loss/1", "val/mtp_loss/2"]
    excess = grade.metrics(grade.sums.tolist(), dict(zip(names, losses, strict=True)))
    assert excess == {f"task/excess_loss/{k}": pytest.approx(0, abs=1e-9) for k in range(3)}


def test_the_reference_has_the_names_of_the_metrics_and_the_values_of_the_closed_forms():
    task, chain = (
        MarkovTask(type="markov", states=8),
        transition_matrix(8, sharpness=2.0, chain_seed=0),
    )
    parallel = task.reference(MTPConfig(mode="parallel", num_nextn_predict_layers=2))
    assert parallel["val/main_loss"] == step_entropy(chain, 1) and parallel[
        "val/mtp_loss/2"
    ] == step_entropy(chain, 3)
    joint = [parallel[f"acceptance/T1/joint/{k}"] for k in (1, 2)]
    assert (
        parallel["acceptance/T1/tokens_per_step"] == 1 + sum(joint) and 0 < joint[1] < joint[0] < 1
    )
    sequential = task.reference(MTPConfig(num_nextn_predict_layers=2))
    assert sequential.keys() == parallel.keys() and sequential["acceptance/T0/tokens_per_step"] == 3
    assert task.reference(MTPConfig(mode="none")) == {"val/main_loss": step_entropy(chain, 1)}
    assert STAR.reference(MTPConfig()) == {}


@pytest.fixture
def make_run(tmp_path):
    def make(name="run", **overrides):
        base = {"data.task": SUFFIX, "data.seq_len": 6, "train.total_tokens": 8 * 8 * 6}
        base |= {"train.batch_size": 8, "train.micro_batch_size": 4}
        base |= {"checkpoint.every": 4, "eval.every": 4, "eval.batches": 4}
        return short_run(tmp_path, name, None, base, overrides)

    return make


def train(config, *function, world_size=1):
    return timeless(trained(config, *function, world_size=world_size))


@pytest.mark.dist
def test_a_task_run_resumes_bitwise_and_validates_as_its_saved_model_does(make_run):
    expected = train(make_run("whole"))
    config = make_run("parts")
    train(config, train_until, 3)
    assert train(config) == expected
    last = expected[-1]
    folder = Path(config.run.dir) / "parts"
    model, loaded = open_model(run=str(folder), hf=None, seq_len=None, micro_batch_size=None)
    source = validation_source(loaded)
    again = validate(model, source, loaded, batches=4, device=torch.device("cpu"))
    for key in ("task/exact_match", "task/first_sum", "val/main_loss"):
        assert again[key] == pytest.approx(last[key], rel=1e-5), key
    # by generating each answer alone, and counting
    stream = source.stream(6, None)
    examples = [stream.examples(row)[0] for row in range(16)]
    given = [
        generate(model, [e.tokens[:4]], Settings(max_new_tokens=3)).tokens[0] for e in examples
    ]
    right = [tokens == e.tokens[4:] for tokens, e in zip(given, examples, strict=True)]
    assert last["task/exact_match"] == sum(right) / 16
    found = acceptance(model, source, depth=1, prompts=8, seq_len=6, new_tokens=99)
    assert 1 <= found["val/tokens_per_step"] <= 2
    for seq_len in (2, 13):  # whose rows hold no example, or two: the same answers
        assert (
            acceptance(model, source, depth=1, prompts=8, seq_len=seq_len, new_tokens=99) == found
        )
    data = json.loads((folder / "manifest.json").read_text())["starts"][-1]["data"]
    assert data["train/0"] == data["val"] and data["val"]["path"] == "data.task suffix_sum"
    notes = export_hf(folder, folder / "hf")
    assert "no tokenizer: data.task suffix_sum generates token ids, not text" in notes
    with pytest.raises(ValueError, match="no split 'train'"):
        validation_source(loaded, "train")


@pytest.mark.dist
@pytest.mark.parametrize(
    "settings",
    [
        {"data__seq_len": 15, "data__mask_documents": True, "train__total_tokens": 4 * 8 * 15},
        {
            "data__task": {"type": "markov", "states": 16},
            "mtp__mode": "parallel",
            "mtp__num_nextn_predict_layers": 2,
        },
    ],
    ids=["packed", "markov"],
)
def test_two_ranks_train_and_grade_as_one(make_run, settings):
    one, two = train(make_run("one", **settings)), train(make_run("two", **settings), world_size=2)
    assert any(key.startswith("task/") for key in one[-1])
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        for key in (
            "train/loss",
            "train/mtp_loss/1",
            "val/main_loss",
            "task/exact_match",
            "task/excess_loss/2",
        ):
            if key in a:
                assert a[key] == pytest.approx(b[key], rel=2e-5, abs=2e-5), (a["step"], key)
