"""A run folder says what the weights in it were trained with, whatever is started there later."""

import json
import os
import shutil
from functools import partial

import pytest

from dsv3_mtp.config import load_config
from dsv3_mtp.report.metrics import MetricsLog
from tests.conftest import tiny
from tests.ranks import run_ranks, train_to_end, write_markov

pytestmark = pytest.mark.dist


def make(data: str, overrides=None):
    """A config of 6 steps whose run lies below the working directory."""
    own = {"run.dir": "runs", "data.train": data, "data.val": data, "train.dtype": "float32"}
    return tiny(own | {"train.total_tokens": 6 * 4 * 16} | (overrides or {}))


@pytest.fixture(scope="module")
def origin(tmp_path_factory):
    """(folder with a trained run, its data)."""
    folder = tmp_path_factory.mktemp("origin")
    data = write_markov(folder / "markov", tokens=3000, documents=40)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert run_ranks(train_to_end, make(data), log=folder / "first") == [0]
    return folder, data


@pytest.fixture
def finished(origin, tmp_path, monkeypatch):
    """A function from overrides to a config of 6 steps; that with none has been trained here."""
    folder, data = origin
    shutil.copytree(folder / "runs", tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    return partial(make, data)


def record(tmp_path):
    folder = tmp_path / "runs" / "tiny"
    starts = json.loads((folder / "manifest.json").read_text())["starts"]
    return load_config(folder / "config.yaml"), starts


@pytest.mark.parametrize(
    "changes", [{"mtp.loss_weight": 0.7}, {"optim.lr": 0.1}, {"optim.lr": 0.1, "log.every": 2}]
)
def test_a_finished_run_is_not_started_again_with_other_training_settings(
    finished, tmp_path, changes
):
    before = record(tmp_path)
    assert run_ranks(train_to_end, finished(changes), log=tmp_path / "again") == [1]
    said = (tmp_path / "again.rank0").read_text()
    assert "is finished and was trained with other settings" in said
    assert next(iter(changes)) in said and "log.every" not in said
    assert record(tmp_path) == before


def test_a_finished_run_started_again_as_it_was_or_with_other_places_leaves_its_record(
    finished, tmp_path
):
    before = record(tmp_path)
    assert run_ranks(train_to_end, finished({"log.every": 3}), log=tmp_path / "again") == [0]
    assert record(tmp_path) == before


def test_a_longer_run_says_that_its_rate_is_warmed_again_and_each_start_keeps_its_config(
    finished, tmp_path
):
    longer = finished({"train.total_tokens": 12 * 4 * 16, "mtp.loss_weight": 0.7})
    assert run_ranks(train_to_end, longer, log=tmp_path / "longer") == [0]
    said = (tmp_path / "longer.rank0").read_text()
    assert "progress goes from 100% to 50%" in said and "it is warmed again" in said
    config, starts = record(tmp_path)
    assert config == longer
    assert [start["step"] for start in starts] == [0, 6]
    assert starts[0]["config"] == finished().to_dict()
    assert starts[1]["config"] == longer.to_dict()


def test_a_line_has_the_share_of_clipped_steps_since_the_line_before_also_after_a_resume(tmp_path):
    data = write_markov(tmp_path / "markov", tokens=3000, documents=40)
    own = {"optim.grad_clip": 0.8, "mtp.detach": "all", "checkpoint.every": 5, "eval.every": 0}

    def shares(name: str, every: int, steps: int = 10) -> dict[int, list[float]]:
        keys = {"run.name": name, "run.dir": str(tmp_path), "log.every": every}
        length = {"train.total_tokens": steps * 4 * 16}
        assert run_ranks(train_to_end, make(data, own | keys | length), log=tmp_path / name) == [0]
        lines = map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
        sides = [f"optim/clipped/{side}" for side in ("trunk", "mtp")]
        return {x["step"]: [x[key] for key in sides] for x in lines if sides[0] in x}

    each, some = shares("each", 1), shares("some", 4)
    assert list(some) == [1, 4, 8, 10] and 0 < sum(sum(flags) for flags in each.values()) < 20
    for first, last in ((2, 4), (5, 8), (9, 10)):
        flags = [each[step] for step in range(first, last + 1)]
        assert some[last] == pytest.approx([sum(x) / len(flags) for x in zip(*flags, strict=True)])
    shutil.rmtree(tmp_path / "some/checkpoints/global_step10")  # it goes on at 5, between two lines
    assert shares("some", 4) == some


class Rank0Log(MetricsLog):
    def __init__(self, path):
        assert os.environ["RANK"] == "0", "another rank opens metrics.jsonl, which writes it anew"
        super().__init__(path)


@pytest.mark.dist
def test_rank_0_alone_opens_the_log_or_dropped_steps_come_back(tmp_path, monkeypatch):
    monkeypatch.setattr("dsv3_mtp.train.trainer.MetricsLog", Rank0Log)
    data = write_markov(tmp_path / "markov", tokens=3000, documents=40)
    keys = {"run.dir": str(tmp_path), "data.train": data, "data.val": data, "eval.every": 0}
    config = tiny(keys | {"train.total_tokens": 4 * 16, "train.micro_batch_size": 2})
    codes = run_ranks(train_to_end, config, world_size=2, log=tmp_path / "log")
    assert codes == [0, 0], (tmp_path / "log.rank1").read_text()
