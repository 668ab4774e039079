"""A run folder says what the weights in it were trained with, whatever is started there later."""

import json

import pytest

from dsv3_mtp.config import load_config
from tests.ranks import run_ranks, train_to_end, write_markov

pytestmark = pytest.mark.dist


@pytest.fixture
def finished(tmp_path, make_tiny_config):
    """make(overrides) -> a config of 6 steps in one folder; that with none has been trained."""
    data = write_markov(tmp_path / "markov", tokens=3000, documents=40)
    own = {
        "run.dir": str(tmp_path / "runs"),
        "data.train": data,
        "data.val": data,
        "train.dtype": "float32",
        "train.total_tokens": 6 * 4 * 16,
    }

    def make(overrides=None):
        return make_tiny_config(own | (overrides or {}))

    assert run_ranks(train_to_end, make(), log=tmp_path / "first") == [0]
    return make


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
