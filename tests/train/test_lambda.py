"""lambda in a run: what is logged is what was used, and a schedule with a state goes on bitwise."""

from pathlib import Path

import pytest
import torch

from dsv3_mtp.config import schedules
from dsv3_mtp.files.run_folder import newest_checkpoint
from dsv3_mtp.study.expand import shared_steps
from dsv3_mtp.train import checkpoint
from tests.conftest import short_run
from tests.made_runs import read_newest
from tests.ranks import folder_of, timeless, train_until, trained, write_markov

pytestmark = pytest.mark.dist
STEPS = 8
RATIO = {"type": "examples.loss_ratio:LossRatio", "share": 0.3, "first": 0.2}


@pytest.fixture
def make_run(tmp_path):
    """A function from overrides to the config of an 8-step run with two depths on Markov data."""
    data = write_markov(tmp_path / "data" / "markov", tokens=2000, documents=20)

    def make(name="run", **overrides):
        base = {"mtp.num_nextn_predict_layers": 2, "train.total_tokens": STEPS * 4 * 16}
        base |= {"train.micro_batch_size": 2, "checkpoint.every": 100, "eval.every": 0}
        return short_run(tmp_path, name, data, base, overrides)

    return make


def train(config, *function, world_size=1) -> list[dict]:
    return [r for r in trained(config, *function, world_size=world_size) if "train/loss" in r]


def recombines(record: dict) -> bool:
    heads = sum(record[f"train/mtp_weight/{k}"] * record[f"train/mtp_loss/{k}"] for k in (1, 2))
    total = record["train/main_loss"] + heads + record["train/balance_loss"]
    return record["train/loss"] == pytest.approx(total, rel=1e-6)


def test_logged_terms_recombine_to_the_loss_per_depth_with_the_schedules_lambda(make_run):
    """Other schedules: tests/objectives/test_training.py."""
    step = {"type": "step", "values": [0.3, 0.1], "at": [0.5]}
    depths = {"mtp__curriculum": "reverse", "mtp__depth_weights": {"type": "exponential"}}
    records = train(make_run(mtp__loss_weight=step, **depths))
    assert [r["train/mtp_weight"] for r in records] == [0.3] * (STEPS // 2) + [0.1] * (STEPS // 2)
    assert all(recombines(r) for r in records)
    switched_off = {k for r in records for k in (1, 2) if r[f"train/mtp_weight/{k}"] == 0}
    assert switched_off == {2}


def test_a_state_sees_the_steps_before_and_what_it_gave_is_logged(make_run):
    config = make_run(mtp__loss_weight=RATIO)
    records = train(config)
    state = schedules.first_state(config.mtp)
    for n, r in enumerate(records):
        given = schedules.mtp_loss_weight(config.mtp.loss_weight, n / STEPS, state)
        assert r["train/mtp_weight"] == given and recombines(r)
        state = schedules.next_state(config.mtp, state, r)
    assert records[0]["train/mtp_weight"] == 0.2
    assert len({r["train/mtp_weight"] for r in records}) == STEPS
    newest = newest_checkpoint(folder_of(config) / "checkpoints")
    assert checkpoint.read_state(newest)["loss_weight"] == state


@pytest.mark.parametrize(
    ("world_size", "stage"), [pytest.param(1, 0, marks=pytest.mark.slow), (2, 1)]
)
def test_a_run_with_a_state_resumes_bitwise(make_run, world_size, stage):
    settings = {"mtp__loss_weight": RATIO, "parallel__zero_stage": stage}
    whole, parts = make_run("whole", **settings), make_run("parts", **settings)
    expected = train(whole, world_size=world_size)
    train(parts, train_until, 4, world_size=world_size)
    assert newest_checkpoint(folder_of(parts) / "checkpoints").name == "global_step4"
    assert timeless(train(parts, world_size=world_size)) == timeless(expected)
    ends = [read_newest(folder_of(config)) for config in (whole, parts)]
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


def test_a_schedule_of_another_type_begins_with_its_first_state_and_says_so(make_run):
    train(make_run(), train_until, 2)
    config = make_run(mtp__loss_weight=RATIO)
    records = train(config)
    assert records[2]["train/mtp_weight"] == 0.2
    log = (Path(config.run.dir).parent / "run.log.rank0").read_text()
    assert "of another type than before, begins with its first state" in " ".join(log.split())


def test_arms_with_a_state_share_no_steps(make_run):
    plain, ratio = make_run(), make_run(mtp__loss_weight=RATIO)
    assert shared_steps(plain, plain) == STEPS
    assert shared_steps(ratio, ratio) == shared_steps(ratio, plain) == 0
