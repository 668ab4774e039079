"""W&B and TensorBoard get every number of a run, its name, its whole config and its last table."""

import importlib.machinery
import sys
import types
from typing import Any

import pytest

from dsv3_mtp.report.metrics import read_metrics
from dsv3_mtp.report.monitors import TensorBoard, flat, open_monitors
from tests.conftest import tiny
from tests.ranks import run_ranks, write_markov
from tests.test_pages import unexplained

WANDB = {"log.wandb": {"project": "mtp", "group": "sweep", "tags": ["night"]}}


class RecordingRun:
    """What the documentation of wandb.Run promises, as far as it is used; it keeps the calls."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        self.arguments, self.logged, self.axes = arguments, [], {}  # type: ignore[var-annotated]
        self.summary: dict[str, Any] = {}
        self.finished = False

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.axes[name] = step_metric

    def log(self, data: dict[str, Any]) -> None:
        self.logged.append(data)

    def finish(self) -> None:
        self.finished = True


@pytest.fixture
def wandb(monkeypatch) -> list[RecordingRun]:
    """Stands for the module wandb; the runs that were started."""
    runs: list[RecordingRun] = []

    def init(**arguments: Any) -> RecordingRun:
        runs.append(RecordingRun(arguments))
        return runs[-1]

    module = types.ModuleType("wandb")
    module.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    module.init = init  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", module)
    return runs


def test_wandb_knows_a_run_by_name_config_and_an_id_that_a_resume_keeps(tmp_path, wandb):
    config = tiny(WANDB)
    (first,) = open_monitors(config, tmp_path, 0)
    first.log({"train/main_loss": 3.0, "train/mtp_loss/1": 3.5}, 64)
    first.finish({"val/main_loss": 2.5})
    (again,) = open_monitors(config, tmp_path, 64)
    again.finish({})
    begun, resumed = (run.arguments for run in wandb)
    assert begun == resumed and begun["resume"] == "allow"
    assert begun["name"] == "tiny" and begun["config"] == config.to_dict()
    assert begun["project"] == "mtp" and begun["group"] == "sweep"
    assert begun["tags"] == ["sequential", "D=1", "lambda step", "night"]
    assert wandb[0].logged == [{"train/main_loss": 3.0, "train/mtp_loss/1": 3.5, "tokens": 64}]
    assert wandb[0].axes == {"tokens": None, "*": "tokens"}
    assert wandb[0].summary == {"val/main_loss": 2.5} and wandb[0].finished
    (tmp_path / "other").mkdir()
    (other,) = open_monitors(config, tmp_path / "other", 0)
    other.finish({})
    assert wandb[2].arguments["id"] != begun["id"]


def test_a_login_that_is_missing_is_one_sentence(tmp_path, wandb, monkeypatch):
    def refuse(**arguments: Any) -> None:
        raise RuntimeError("no API key")

    monkeypatch.setattr(sys.modules["wandb"], "init", refuse)
    with pytest.raises(ValueError, match=r"log\.wandb: .*no API key; log in with `wandb login`"):
        open_monitors(tiny(WANDB), tmp_path, 0)


def read_events(folder) -> tuple[dict[str, list[tuple[int, float]]], list[str]]:
    """Scalars as (step, value) by name, and the tags of all other summaries."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    tags = events.Tags()["scalars"]
    other = [*events.Tags()["tensors"], *events.summary_metadata]
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in tags}, other


def test_tensorboard_has_the_settings_beside_the_last_table(tmp_path):
    monitor = TensorBoard(tiny(), tmp_path, 0)
    monitor.log({"train/main_loss": 3.0}, 64)
    monitor.finish({"val/main_loss": 2.5})
    scalars, other = read_events(tmp_path)
    assert scalars["train/main_loss"] == [(64, 3.0)]
    assert "config/text_summary" in other and "_hparams_/session_start_info" in other
    content = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert b"mtp.loss_weight.type" in content and b"val/main_loss" in content


def test_tensorboard_forgets_what_a_kill_left_behind_the_checkpoint(tmp_path):
    killed = TensorBoard(tiny(), tmp_path, 0)
    for tokens in (64, 128, 192):
        killed.log({"train/main_loss": 3.0}, tokens)
    killed.writer.close()
    resumed = TensorBoard(tiny(), tmp_path, 64)
    resumed.log({"train/main_loss": 2.0}, 128)
    resumed.writer.close()
    assert read_events(tmp_path)[0]["train/main_loss"] == [(64, 3.0), (128, 2.0)]


def test_every_setting_has_a_flat_name():
    assert dict(flat({"a": {"b": 1, "c": [1, 2]}, "d": None})) == {
        "a.b": 1,
        "a.c": "[1, 2]",
        "d": "None",
    }


def _train(config: Any, runs: list[RecordingRun]) -> None:
    from dsv3_mtp.train.trainer import Trainer

    Trainer(config, command=["test"]).run()
    (run,) = runs
    records = read_metrics(f"{config.run.dir}/tiny/metrics.jsonl")
    sent = [{k: v for k, v in r.items() if "/" in k} | {"tokens": r["tokens"]} for r in records]
    assert run.logged == sent and any("train/mtp_loss/2" in line for line in sent)
    last = [line for line in sent if "val/main_loss" in line][-1]
    assert run.summary == {key: value for key, value in last.items() if "/" in key}
    assert run.finished
    assert unexplained(name for record in records for name in record) == []


@pytest.mark.dist
def test_a_run_sends_all_that_metrics_jsonl_has_per_depth_too(tmp_path, wandb):
    data = write_markov(tmp_path / "markov", tokens=3000, documents=40)
    own = {"run.dir": str(tmp_path), "data.train": data, "data.val": data}
    own |= {"train.dtype": "float32", "train.total_tokens": 256, "mtp.num_nextn_predict_layers": 2}
    log = tmp_path / "log"
    assert run_ranks(_train, tiny(own | WANDB), wandb, log=log) == [0], (
        tmp_path / "log.rank0"
    ).read_text()
