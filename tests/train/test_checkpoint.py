"""A checkpoint is the same whatever layout of ranks wrote it, and any layout goes on from it."""

import itertools
import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from dsv3_mtp.config import Config
from dsv3_mtp.config.layout import describe
from dsv3_mtp.files.fragments import Fragments
from dsv3_mtp.files.run_folder import COMPLETE
from dsv3_mtp.hf import export_hf
from dsv3_mtp.model.causal_lm import DeepseekV3MTP
from dsv3_mtp.train.process import own_process
from tests.made_runs import randomise, write_run
from tests.ranks import run_ranks, write_markov

pytestmark = pytest.mark.dist
# (ranks, parallel section): each goes on from what the one before it wrote; the first from the same
# layout, bit for bit
ZERO = [(2, {"zero_stage": 1}), (2, {"zero_stage": 0}), (2, {"zero_stage": 3})]
MORE = [
    (2, {"zero_stage": 2, "offload_optimizer": True, "sequence_parallel_size": 2}),
    (2, {"zero_stage": 1, "expert_parallel_size": 2}),
    (2, {"zero_stage": 1, "pipeline_stages": 2}),
]
FOUR = [(4, {"zero_stage": 1, "expert_parallel_size": 2, "pipeline_stages": 2})]
ONE = [(1, {"zero_stage": 3}), (1, {"zero_stage": 0})]


def frozen(tmp_path: Path, make_tiny_config, dtype: str) -> dict:
    """Settings that train only the MTP heads, on weights of their own, which are stored as
    `dtype`.
    """
    config = make_tiny_config({"mtp.num_nextn_predict_layers": 2})
    run = write_run(tmp_path / "origin", config, randomise(DeepseekV3MTP(config.model, config.mtp)))
    export_hf(run, tmp_path / "hf", dtype=dtype)
    return {"train.freeze": "trunk", "mtp.detach": "trunk", "train.init_from": str(tmp_path / "hf")}


@pytest.mark.parametrize(
    ("dtype", "moments", "freeze", "layouts", "tolerance"),
    [
        ("float32", "bfloat16", None, ZERO + MORE + ONE[1:], 2e-6),
        pytest.param(*("float32", "bfloat16", None, FOUR + ONE, 2e-6), marks=pytest.mark.slow),
        pytest.param(
            *("bfloat16", "float32", None, ZERO + MORE + ONE, 2**-8), marks=pytest.mark.slow
        ),
        pytest.param(*("bfloat16", "float32", "bf16", ZERO + ONE, 1e-4), marks=pytest.mark.slow),
        pytest.param(
            *("bfloat16", "float32", "fp8", ZERO + MORE[:2] + ONE, 2**-8), marks=pytest.mark.slow
        ),
    ],
    ids=["float32", "four ranks", "bfloat16", "frozen trunk", "frozen trunk in FP8"],
)
def test_every_layout_reads_what_another_wrote_and_goes_on_alike(
    tmp_path, make_tiny_config, dtype, moments, freeze, layouts, tolerance
):
    data = write_markov(tmp_path / "markov", tokens=3000, documents=40)
    base = {
        "run.dir": str(tmp_path / "runs"),
        "data.train": data,
        "data.val": data,
        "train.dtype": dtype,
    }
    base |= {
        "train.batch_size": 8,
        "mtp.num_nextn_predict_layers": 2,
        "optim.schedule": {"warmup": 0.0},
    }
    base |= {"optim.moments": moments, "train.ema_decay": 0.8}
    base |= frozen(tmp_path, make_tiny_config, freeze) if freeze else {}
    # every expert: a rounding that changes a choice moves the norm by 0.5 %
    if dtype == "bfloat16" and not freeze:
        base |= {"model.num_experts_per_tok": 8, "model.topk_group": 4}

    def config(number: int, ranks: int, parallel: dict) -> Config:
        own = {"run.name": f"run{number}", "train.micro_batch_size": 2 if ranks == 4 else 4}
        own |= {f"parallel.{key}": value for key, value in parallel.items()}
        if parallel["zero_stage"] == 3:  # the tiny model's parameters would all stay whole
            own["deepspeed.zero_optimization"] = {"stage3_param_persistence_threshold": 0}
        return make_tiny_config(base | own)

    runs = [
        (ranks, config(i, ranks, parallel))
        for i, (ranks, parallel) in enumerate([layouts[0], *layouts])
    ]
    log, previous = tmp_path / "log", None
    for ranks, group in itertools.groupby(runs, key=lambda run: run[0]):
        configs = [config for _, config in group]
        codes = run_ranks(walk, configs, previous, world_size=ranks, log=log)
        assert codes == [0] * ranks, "".join(
            path.read_text() for path in tmp_path.glob("log.rank*")
        )
        previous = configs[-1]

    expected, wanted = everything(saved(runs[0][1])), went_on(runs[0][1])["losses"]
    assert {value.dtype for key, value in expected.items() if "/exp_avg" in key} == {
        getattr(torch, moments)
    }
    assert {key.removesuffix("/ema") for key in expected if key.endswith("/ema")} == {
        k for k in expected if "/" not in k and (k.startswith("mtp.") or not freeze)
    }
    for (ranks_before, before), (ranks, here) in itertools.pairwise(runs):
        layout, moved = (
            describe(here, ranks),
            f", a checkpoint of {describe(before, ranks_before)}, on ",
        )
        got, after = everything(saved(here)), went_on(here)
        assert got.keys() == expected.keys(), layout
        assert all(torch.equal(value, got[key]) for key, value in expected.items()), layout
        assert after["losses"] == pytest.approx(wanted, rel=tolerance), layout
        text = "\n".join(after["notes"])
        assert "resumed at step 3" in text
        if here.parallel == before.parallel and ranks == ranks_before:
            assert after["losses"] == wanted and "a checkpoint of" not in text
        else:
            assert moved + layout in text


def walk(configs: list[Config], previous: Config | None) -> None:
    """Takes three steps, or goes on from the previous run's checkpoint; saves; takes two more
    steps.
    """
    for config in configs:
        if previous is not None and os.environ["RANK"] == "0":
            shutil.copytree(saved(previous), saved(config))
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
        trainer = own_process(config, command=["test"])
        if trainer.step:  # what was read is no complete checkpoint any more, and is written again
            (saved(config) / COMPLETE).unlink(missing_ok=True)
            torch.distributed.barrier()
        else:
            [trainer.optimizer_step() for _ in range(3)]
        trainer.save()
        records = [trainer.optimizer_step()[0] for _ in range(2)]
        losses = [record[key] for record in records for key in ("train/loss", "optim/grad_norm")]
        if trainer.world.is_main:
            (trainer.folder / "went_on.json").write_text(
                json.dumps({"notes": trainer.notes, "losses": losses})
            )
        previous = config


def went_on(config: Config) -> dict:
    return json.loads((saved(config).parents[1] / "went_on.json").read_text())


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
