"""What a run says first: the model, how often it reads its data, the schedule of lambda."""

from types import SimpleNamespace

import pytest
import torch

from dsv3_mtp.config.loss_weights import LOSS_WEIGHTS
from dsv3_mtp.data.sampler import Sampler
from dsv3_mtp.model.causal_lm import meta_model
from dsv3_mtp.model.size import model_size
from dsv3_mtp.parallel.launch import World
from dsv3_mtp.report.progress import WIDTH
from dsv3_mtp.train.words import busy, data_pieces, header, lambda_pieces, weightless
from tests.config.test_loss_weights import EXAMPLES
from tests.conftest import tiny

ALONE = World(0, 1, 0, torch.device("cpu"))


def source(path: str, tokens: int | None, vocab_size: int | None = None) -> SimpleNamespace:
    return SimpleNamespace(path=path, tokens=tokens, vocab_size=vocab_size)


def sampler(*sources: SimpleNamespace, weights: list[float] | None = None) -> Sampler:
    weights = weights or [1.0]
    return SimpleNamespace(sources=sources, weights=weights)  # type: ignore[return-value]


def test_epochs_are_the_tokens_that_a_source_gives_over_those_that_it_has():
    config = tiny({"train.total_tokens": 40_960})
    data = sampler(source("a", 1024, 64), source("b", 102_400, 32), weights=[0.25, 0.75])
    assert data_pieces(config, ALONE, data) == [
        "data: 640 steps of 64 tokens",
        "41.0k in all",
        "10 epochs of a (1.02k)",
        "0.3 epochs of b (102k) with 32 of the model's 64 token ids",
    ]


def test_a_task_has_no_epochs_and_a_growing_batch_is_said():
    config = tiny({"train.batch_size_ramp": {"start": 4, "until": 0.5}})
    pieces = data_pieces(config, ALONE, sampler(source("star", None)))
    assert pieces[0].endswith("steps of up to 64 tokens")
    assert pieces[-1] == "newly generated examples of star"


@pytest.mark.parametrize("kind", sorted(LOSS_WEIGHTS))
def test_every_schedule_of_lambda_is_one_line_with_its_keys(kind: str):
    config = tiny({"mtp.loss_weight": EXAMPLES[kind] | {"type": kind}})
    (line,) = lambda_pieces(config)
    assert line.startswith(f"lambda: {kind} (") and len(line) <= WIDTH
    assert all(f"{key} " in line for key in EXAMPLES[kind])


def test_what_else_weighs_the_depths_is_said_only_where_it_differs():
    usual = lambda_pieces(tiny())
    assert usual == ["lambda: step (values [0.3, 0.1], at [0.676], in fractions of the run)"]
    assert lambda_pieces(tiny({"mtp.loss_weight": 0.7})) == ["lambda: constant (value 0.7)"]
    heads = {"mtp.depth_weights": [1.0], "mtp.objective": {"ce": 0.1, "tv": 0.9}}
    assert lambda_pieces(tiny({**heads, "mtp.detach": "trunk"}))[1:] == [
        "detach trunk",
        "objective {ce: 0.1, tv: 0.9}",
        "depth weights [1]",
    ]


def test_no_line_is_wider_than_a_terminal():
    config = tiny({"run.name": "a" * 60, "mtp.num_nextn_predict_layers": 1})
    size = model_size(meta_model(config.model, config.mtp), 16)
    text = header(config, size, ALONE, sampler(source("data/" + "b" * 60, 4096)))
    assert len(text) == 3 and text[0].startswith("a" * 60 + ": ")
    assert max(len(line) for part in text for line in part.splitlines()) <= WIDTH
    assert len(header(tiny({"mtp.mode": "none"}), size, ALONE, sampler(source("x", 64)))) == 2


@pytest.mark.parametrize(
    ("heads", "said"),
    [
        ({"mtp.loss_weight": {"type": "step", "values": [0.3, 0.0], "at": [0.5]}}, "last 50 %"),
        ({"mtp.loss_weight": 0.0}, "last 100 %"),
        ({"mtp.loss_weight": {"type": "linear", "start": 0.3, "end": 0.0}}, None),
        ({"mtp.loss_weight": {"type": "step", "values": [0.0, 0.3], "at": [0.5]}}, None),
        ({"mtp.loss_weight": 0.0, "optim.weight_decay": 0.0}, None),
        ({"mtp.loss_weight": 0.0, "mtp.mode": "none"}, None),
        # TOP's head learns from a term of its own, and same_logits has no module
        ({"mtp.loss_weight": 0.0, "mtp.mode": "top"}, None),
        ({"mtp.loss_weight": 0.0, "mtp.mode": "same_logits"}, None),
    ],
    ids=str,
)
def test_heads_that_end_without_a_weight_are_named(heads, said):
    config = tiny({"mtp.num_nextn_predict_layers": 2, **heads})
    notes = weightless(config, model_size(meta_model(config.model, config.mtp), 16))
    assert [said in note for note in notes] == ([] if said is None else [True])


@pytest.mark.parametrize(
    ("load", "threads", "said"), [(7.9, 2, True), (0.5, 2, False), (7.9, 1, False)]
)
def test_several_threads_on_a_busy_machine_are_warned_of(monkeypatch, load, threads, said):
    monkeypatch.setattr("os.getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1})
    monkeypatch.setattr("torch.get_num_threads", lambda: threads)
    assert any("train.threads: 1" in line for line in busy(ALONE)) == said
