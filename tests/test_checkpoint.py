"""A checkpoint is the same whatever layout of ranks wrote it, and any layout goes on from it."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from dsv3_mtp.config import Config
from dsv3_mtp.fragments import Fragments
from dsv3_mtp.hf import export_hf
from dsv3_mtp.loading import COMPLETE
from dsv3_mtp.model.causal_lm import DeepseekV3MTP
from dsv3_mtp.trainer import Trainer
from tests.made_runs import randomise, write_run
from tests.ranks import run_ranks, write_markov

pytestmark = pytest.mark.dist
SPLIT = {"stage3_param_persistence_threshold": 0}  # the tiny model's parameters would all stay whole
TWO_RANKS = {  # each layout goes on from what the one before it wrote
    "2 ranks x 4 sequences, ZeRO-1": {"zero_stage": 1},
    "2 ranks x 4 sequences, ZeRO-0": {"zero_stage": 0},
    "2 ranks x 4 sequences, ZeRO-3": {"zero_stage": 3},
    "2 ranks x 4 sequences, ZeRO-2 with offload": {"zero_stage": 2, "offload_optimizer": True},
    "2 ranks x 4 sequences, ZeRO-1, EP 2": {"zero_stage": 1, "expert_parallel_size": 2},
}
ONE_RANK = {
    "1 rank x 4 sequences, ZeRO-3": {"zero_stage": 3},
    "1 rank x 4 sequences, ZeRO-0": {"zero_stage": 0},
}


def frozen(tmp_path: Path, make_tiny_config) -> dict:
    """Settings that train only the MTP heads, on weights of their own."""
    config = make_tiny_config({"mtp.num_nextn_predict_layers": 2})
    run = write_run(tmp_path / "origin", config, randomise(DeepseekV3MTP(config.model, config.mtp)))
    export_hf(run, tmp_path / "hf")
    return {"train.freeze": "trunk", "mtp.detach": "trunk", "train.init_from": str(tmp_path / "hf")}


@pytest.mark.parametrize(("dtype", "freeze", "tolerance"), [("float32", False, 2e-6), ("bfloat16", True, 2**-8)])
def test_every_layout_reads_what_another_wrote_and_goes_on_alike(tmp_path, make_tiny_config, dtype, freeze, tolerance):
    data = write_markov(tmp_path / "markov", tokens=3000, documents=40)
    base = {"run.dir": str(tmp_path / "runs"), "data.train": data, "data.val": data, "train.dtype": dtype}
    base |= {"train.batch_size": 8, "mtp.num_nextn_predict_layers": 2, "optim.schedule": {"warmup": 0.0}}
    base |= frozen(tmp_path, make_tiny_config) if freeze else {}

    def config(name: str, parallel: dict) -> Config:
        own = {"run.name": name.replace(",", "").replace(" ", "_"), "parallel.zero_stage": parallel["zero_stage"]}
        own |= {f"parallel.{key}": value for key, value in parallel.items()}
        own |= {"deepspeed.zero_optimization": SPLIT} if parallel["zero_stage"] == 3 else {}
        return make_tiny_config(base | own)

    log = tmp_path / "log"
    two, one = ([config(name, parallel) for name, parallel in layouts.items()] for layouts in (TWO_RANKS, ONE_RANK))
    origin = config("origin", {"zero_stage": 1})
    codes = run_ranks(walk, [origin, *two], None, world_size=2, log=log)
    assert codes == [0, 0], Path(f"{log}.rank0").read_text()
    assert run_ranks(walk, one, two[-1], world_size=1, log=log) == [0], Path(f"{log}.rank0").read_text()

    expected, wanted = everything(saved(origin)), json.loads((saved(origin).parents[1] / "went_on.json").read_text())
    before = "2 ranks x 4 sequences, ZeRO-1"
    for layout, here in zip([*TWO_RANKS, *ONE_RANK], [*two, *one], strict=True):
        got = everything(saved(here))
        assert got.keys() == expected.keys(), layout
        assert all(torch.equal(value, got[key]) for key, value in expected.items()), layout
        went_on = json.loads((saved(here).parents[1] / "went_on.json").read_text())
        text = " ".join(went_on["notes"])
        assert "resumed at step 3" in text and (before == layout or f", a checkpoint of {before}, on {layout}" in text)
        assert ("random generators start anew" in text) == (before[0] != layout[0])
        if before == layout:
            assert went_on["losses"] == wanted["losses"]  # bit for bit
        assert went_on["losses"] == pytest.approx(wanted["losses"], rel=tolerance), layout
        before = layout


def walk(configs: list[Config], previous: Config | None) -> None:
    """Takes three steps, or goes on from the previous run's checkpoint; saves; takes two more steps."""
    for config in configs:
        if previous is not None and os.environ["RANK"] == "0":
            shutil.copytree(saved(previous), saved(config))
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
        trainer = Trainer(config, command=["test"])
        if trainer.step:  # what was read is no complete checkpoint any more, and is written again
            (saved(config) / COMPLETE).unlink(missing_ok=True)
            torch.distributed.barrier()
        else:
            [trainer.optimizer_step() for _ in range(3)]
        trainer.save()
        losses = [trainer.optimizer_step()[0] for _ in range(2)]
        went_on = {
            "notes": trainer.notes,
            "losses": [record[key] for record in losses for key in ("train/loss", "optim/grad_norm")],
        }
        if trainer.world.is_main:
            (trainer.folder / "went_on.json").write_text(json.dumps(went_on))
        previous = config


def saved(config: Config) -> Path:
    return Path(config.run.dir) / config.run.name / "checkpoints" / "global_step3"


def everything(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint and what the optimizer keeps for it, whole."""
    stored, found = Fragments(folder), {}
    for name, about in stored.index.items():
        found[name] = stored.read(name)
        found |= {f"{name}/{key}": stored.read(name, state=key) for key in about["states"]}
        found |= {f"{name}/{key}": torch.tensor(value) for key, value in about["scalars"].items()}
    return found
