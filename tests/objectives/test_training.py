"""Objectives in real runs: what is logged recombines to the loss, low precision, answers of a task.
That a resumed run is the uninterrupted one: tests/train/test_trainer.py.
"""

from pathlib import Path

import pytest

from dsv3_mtp.config import Config, ConfigError, load_config, schedules
from dsv3_mtp.report.metrics import read_metrics
from tests.conftest import short_run
from tests.ranks import run_ranks, train_to_end, write_markov

pytestmark = pytest.mark.dist
STEPS = 4
OBJECTIVE = {"ce": 0.5, "kl": 1.0, "tv": 0.3, "lk_hybrid": 0.2}
LINEAR = {"mtp.mode": "parallel_linear", "mtp.objective": {"lk": 1.0}}
RUNS = {
    "mixture": {
        "mtp.loss_weight": {"type": "linear", "start": 0.3, "end": 0.1},
        "mtp.depth_weights": [1.2, 0.8],
        "mtp.curriculum": "forward",
        "data.mask_documents": True,
    },
    "no label": LINEAR,
    "fp8": {"train.dtype": "bfloat16", "fp8.enabled": True, "fp8.backend": "emulate"},
    "recomputed": {"train.activation_checkpointing": "full", "train.dtype": "bfloat16"},
    "task": {
        "data.train": None,
        "data.mask_documents": True,
        "data.val": None,
        "data.task": {"type": "suffix_sum", "terms": 3, "modulus": 3},
        "model.max_position_embeddings": 32,
    },
}


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    folder = tmp_path_factory.mktemp("objectives")
    data = write_markov(folder / "markov", tokens=3000, documents=300)

    def config(name: str, keys: dict) -> Config:
        base = {"mtp.objective": OBJECTIVE, "mtp.num_nextn_predict_layers": 2}
        base |= {"train.total_tokens": STEPS * 8 * 16, "train.batch_size": 8, "eval.every": STEPS}
        return short_run(folder, name, data, base, keys)

    return config


def train_all(configs: list[Config]) -> None:
    for config in configs:
        train_to_end(config)


def records_of(config: Config) -> list[dict]:
    return read_metrics(Path(config.run.dir) / config.run.name / "metrics.jsonl")


@pytest.fixture(scope="module")
def runs(make) -> dict[str, Config]:
    configs = {name: make(name, keys) for name, keys in RUNS.items()}
    folder = Path(next(iter(configs.values())).run.dir)
    log = folder.parent / "log"
    codes = run_ranks(train_all, list(configs.values()), log=log, timeout=280)
    assert codes == [0], Path(f"{log}.rank0").read_text()
    return configs


@pytest.mark.parametrize("name", RUNS)
def test_what_is_logged_recombines_to_the_loss(runs, name):
    config = runs[name]
    trained = [r for r in records_of(config) if "train/loss" in r]
    assert len(trained) == STEPS
    for at, record in enumerate(trained):
        before = trained[at - 1]["tokens"] if at else 0
        weights = schedules.depth_loss_weights(config.mtp, before / config.train.total_tokens)
        total = record["train/main_loss"] + record["train/balance_loss"]
        for objective, share in config.mtp.objective.items():
            key = "mtp_loss" if objective == "ce" else objective
            for k, weight in enumerate(weights, start=1):
                total += weight * share * record.get(f"train/{key}/{k}", 0.0)
        assert record["train/loss"] == pytest.approx(total, rel=1e-5)
        assert "train/mtp_loss/1" in record  # whatever the objective is
    val = records_of(config)[-1]
    assert all(f"val/{name}/1" in val for name in config.mtp.objective if name != "ce")


BAD = {
    "mtp.objective={kll: 1}": "mtp.objective.kll: must be one of ce, kl, lk, lk_hybrid, tv "
    "(got 'kll'); did you mean 'kl'?",
    "mtp.objective={kl: 0}": "mtp.objective.kl: must be > 0 (got 0)",
    "mtp.objective={}": "mtp.objective: must name at least one objective",
    "mtp.mode=none": "mtp.objective: has no effect with mode none",
    "mtp.objective={no.where:X: 1}": "no.where cannot be imported",
    "mtp.objective={dsv3_mtp.objectives.base:Slots: 1}": "is no subclass of",
    "mtp.objective={kl: 1, dsv3_mtp.objectives.kl:KL: 1}": "is logged under the name of kl, kl",
    "mtp.loss_weight=0": "mtp.loss_weight: is 0 from start to end, and with train.freeze: trunk",
    "mtp.num_nextn_predict_layers=9": "must leave each rank at least 9 of the data.seq_len = 16",
}


@pytest.mark.parametrize("change", BAD)
def test_what_cannot_be_is_said_in_one_sentence(change, make, tmp_path):
    """And nothing else is: the config is right without the change."""
    right = {
        "mtp.objective": {"kl": 1.0},
        "mtp.detach": "all",
        "train.freeze": "trunk",
        "train.init_from": "hf",
        "parallel.sequence_parallel_size": 2,
    }
    (tmp_path / "config.yaml").write_text(make("right", right).to_yaml())
    load_config(tmp_path / "config.yaml")
    with pytest.raises(ConfigError) as error:
        load_config(tmp_path / "config.yaml", [change])
    others = ("train.freeze", "mtp.detach")  # of mode none
    said = [problem for problem in error.value.problems if problem[0] not in others]
    assert len(said) == 1 and BAD[change] in ": ".join(said[0])


def test_an_objective_replaces_that_of_a_base(make, tmp_path):
    (tmp_path / "base.yaml").write_text(make("base", {"mtp.objective": {"ce": 1.0}}).to_yaml())
    (tmp_path / "mine.yaml").write_text("base: base.yaml\nmtp:\n  objective: {kl: 2.0}\n")
    assert load_config(tmp_path / "mine.yaml").mtp.objective == {"kl": 2.0}
    changed = load_config(tmp_path / "mine.yaml", ["mtp.objective={tv: 1}"])
    assert changed.mtp.objective == {"tv": 1.0}
