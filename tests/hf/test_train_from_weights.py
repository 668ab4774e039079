"""Training that starts from a checkpoint: `train.init_from`, and `train.freeze: trunk` in real
processes.
"""

from pathlib import Path

import pytest
import torch

from dsv3_mtp.data.source import open_source
from dsv3_mtp.hf import export_hf, import_hf, load_hf
from dsv3_mtp.ops.tuning import tune_cpu
from dsv3_mtp.train.validation import open_model, validate
from tests.conftest import short_run
from tests.made_runs import read_newest
from tests.ranks import folder_of, run_ranks, train_to_end, trained, write_markov

pytestmark = pytest.mark.dist
STEPS = 3


@pytest.fixture
def train(tmp_path, make_tiny_config):
    """A function from overrides to (run folder, metrics, log) of a short run on Markov data."""
    data = write_markov(tmp_path / "data" / "markov", tokens=2000, documents=20)

    def make(name, *, world_size=1, expect=0, **overrides):
        base = {"train.total_tokens": STEPS * 8 * 16, "train.batch_size": 8}
        base["optim.schedule"] = {"warmup": 0.0}
        config = short_run(tmp_path, name, data, base, overrides)
        metrics = trained(config, world_size=world_size, expect=expect)
        return folder_of(config), metrics, Path(f"{tmp_path / name}.log.rank0").read_text()

    return make


def test_a_run_starts_from_the_weights_of_an_export(tmp_path, train):
    first, metrics, _ = train("first")
    export_hf(first, tmp_path / "hf", dtype="fp32")
    # Measured before any update moves the weights: a learning rate of nothing.
    _, again, log = train(
        "again", train__init_from=str(tmp_path / "hf"), optim__lr=1e-30, train__bias_update_speed=0
    )
    assert "weights from" in log
    last = metrics[-1]
    model, config = open_model(run=str(first), hf=None, seq_len=None, micro_batch_size=None)
    source, cpu = open_source(config.data.val, "val"), torch.device("cpu")
    tune_cpu()  # as training does
    found = validate(model, source, config, batches=config.eval.batches, device=cpu)
    # bit for bit; the floors of a run's text are counted by the trainer, not by `validate`
    assert found == {
        key: value
        for key, value in last.items()
        if key.startswith("val/") and not key.startswith("val/floor/")
    }
    for key in ("val/main_loss", "val/mtp_loss/1", "val/top1/0", "val/agreement/1"):
        assert again[-1][key] == pytest.approx(last[key], abs=1e-6), key


@pytest.mark.parametrize("zero_stage", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_fresh_module_learns_on_a_frozen_trunk_that_does_not_move(tmp_path, train, zero_stage):
    base, _, _ = train("base", mtp__mode="none")
    notes = export_hf(base, tmp_path / "hf", dtype="fp32")
    assert not [note for note in notes if "not exported" in note]
    folder, metrics, log = train(
        "head",
        world_size=2,
        mtp__detach="trunk",
        train__freeze="trunk",
        train__init_from=str(tmp_path / "hf"),
        train__bias_update_speed=0.01,
        train__micro_batch_size=4,
        parallel__zero_stage=zero_stage,
    )
    assert "at their start: MTP module(s) 1..1" in log
    before, after = read_newest(base), read_newest(folder)
    for key, value in after.items():
        if key.startswith("mtp."):
            assert value.norm() > 0
        else:
            assert torch.equal(value, before[key]), key  # router biases included
    bias = after["mtp.layers.0.mlp.gate.e_score_correction_bias"]
    assert bias.abs().max() > 0  # the MTP router's moves
    assert metrics[-1]["val/mtp_loss/1"] < metrics[0]["train/mtp_loss/1"]
    assert [m["val/main_loss"] for m in metrics if "val/main_loss" in m][-1] > 0


def test_an_imported_run_trains_resumes_and_exports(tmp_path, train, make_tiny_config):
    first, _, _ = train("first", mtp__num_nextn_predict_layers=2)
    export_hf(first, tmp_path / "hf")
    data = str(tmp_path / "data" / "markov")
    sets = [
        "train.total_tokens=384",
        "train.batch_size=8",
        "train.micro_batch_size=4",
        "train.threads=1",
        "log.tensorboard=false",
    ]
    imported = tmp_path / "runs" / "imported"
    import_hf(tmp_path / "hf", imported, data=data, sets=[*sets, "checkpoint.every=2"])

    from dsv3_mtp.config import load_config

    config = load_config(imported / "config.yaml")
    assert (config.mtp.mode, config.mtp.depths, config.train.dtype) == ("sequential", 2, "bfloat16")
    for expected in ("weights from", "resumed at step 3"):
        codes = run_ranks(train_to_end, config, log=tmp_path / "imported.log")
        text = (tmp_path / "imported.log.rank0").read_text()
        assert codes == [0] and expected in text, text
    bias = read_newest(imported)["model.layers.1.mlp.gate.e_score_correction_bias"]
    assert bias.dtype == torch.float32
    export_hf(imported, tmp_path / "hf2")
    old, new = (load_hf(tmp_path / name)[0].state_dict() for name in ("hf", "hf2"))
    # Norms start at 1, where bfloat16 does not see a step of this size.
    same = [key for key in old if torch.equal(old[key], new[key]) and "norm" not in key]
    assert same == []


def test_weights_that_do_not_fit_the_config_stop_the_run_before_it_starts(tmp_path, train):
    first, _, _ = train("first")
    export_hf(first, tmp_path / "hf", dtype="fp32")
    overrides = {"model__rope_theta": 5000.0, "mtp__trunk_hidden": "pre_norm"}
    _, metrics, log = train("other", train__init_from=str(tmp_path / "hf"), expect=1, **overrides)
    assert "model.rope_theta: 5000.0, the checkpoint has 10000.0" in log
    assert "mtp.trunk_hidden: pre_norm, the checkpoint's MTP modules have post_norm" in log
    assert metrics == []
