"""Whole runs on a GPU: tools/train.py in bfloat16 and FP8, and their resumption."""

import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dsv3_mtp.config import Config
from dsv3_mtp.metrics import read_metrics
from dsv3_mtp.precision import te
from tests.conftest import TINY_CONFIG
from tests.ranks import write_markov

ROOT = Path(__file__).parents[2]
CUDA = torch.device("cuda")
STEPS, BATCH, LENGTH = 30, 16, 16
RUNS = {"bf16": [], "te": ["fp8.enabled=true", "fp8.backend=te"]}
# Sides of weights are multiples of 16 for FP8. Head widths (28, 12) are none of 8: no fused attention takes them, whose
# backward adds up in any order.
MODEL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "moe_intermediate_size": 32,
    "num_attention_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 16,
    "v_head_dim": 12,
}


def start(config: Path, name: str, log: Path) -> subprocess.Popen:
    sets = [f"run.name={name}", *RUNS[name.partition("_")[0]]]
    command = [sys.executable, str(ROOT / "tools" / "train.py"), "--config", str(config)]
    command += [word for text in sets for word in ("--set", text)]
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "DS_ACCELERATOR": "cuda"}
    with log.open("w") as out:
        return subprocess.Popen(command, stdout=out, stderr=out, env=environment)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The folder of the finished runs, and of the same ones resumed in their middle: NAME and NAME_resumed.

    They run side by side, because each spends most of its time on imports. (A fork could not use CUDA.)
    """
    folder = tmp_path_factory.mktemp("gpu")
    data = write_markov(folder / "markov", tokens=20000, documents=40)
    sections = {name: dict(values) for name, values in TINY_CONFIG.items()}
    sections["model"] |= MODEL
    sections["run"]["dir"] = str(folder / "runs")
    sections["data"] |= {"train": data, "val": data}
    sections["train"] |= {"total_tokens": STEPS * BATCH * LENGTH, "batch_size": BATCH, "micro_batch_size": BATCH // 2}
    sections["train"] |= {"dtype": "bfloat16"}
    sections["checkpoint"] = {"every": STEPS // 2, "keep": 2}
    sections["eval"] = {"every": 0, "batches": 1}
    config = folder / "config.yaml"
    config.write_text(Config.model_validate(sections).to_yaml())
    names = [name for name in RUNS if name != "te" or te.unsupported(CUDA) is None]
    finish(folder, {name: start(config, name, folder / f"{name}.log") for name in names})
    for name in names:
        run = folder / "runs" / f"{name}_resumed"
        shutil.copytree(folder / "runs" / name, run)
        shutil.rmtree(run / "checkpoints" / f"global_step{STEPS}")
        (run / "checkpoints" / "latest").write_text(f"global_step{STEPS // 2}")
    again = [f"{name}_resumed" for name in names]
    finish(folder, {name: start(config, name, folder / f"{name}.log") for name in again})
    return folder


def finish(folder: Path, processes: dict[str, subprocess.Popen]) -> None:
    for name, process in processes.items():
        try:
            code = process.wait(150)
        finally:
            process.kill()
        assert code == 0, f"{name}: {(folder / f'{name}.log').read_text()[-3000:]}"


def steps(folder: Path, name: str) -> list[dict]:
    return [r for r in read_metrics(folder / "runs" / name / "metrics.jsonl") if "train/loss" in r]


@pytest.fixture(params=RUNS)
def name(request) -> str:
    if request.param == "te" and (reason := te.unsupported(CUDA)):
        pytest.skip(f"fp8.backend: te {reason}")
    return request.param


def test_losses_are_finite_and_fall(trained, name):
    records = steps(trained, name)
    assert [r["step"] for r in records] == list(range(1, STEPS + 1))
    for key in ("train/main_loss", "train/mtp_loss/1"):
        losses = [r[key] for r in records]
        assert all(map(math.isfinite, losses))
        assert sum(losses[-5:]) < sum(losses[:5]) - 5 * 0.1, losses
    text = (trained / f"{name}.log").read_text()
    assert ("fp8: te" if name == "te" else "fp8: ") in text and "attention: " in text


def test_a_resumed_run_repeats_the_uninterrupted_one_bit_for_bit(trained, name):
    whole, resumed = steps(trained, name), steps(trained, f"{name}_resumed")
    assert f"resumed at step {STEPS // 2}" in (trained / f"{name}_resumed.log").read_text()
    assert len(whole) == len(resumed) == STEPS
    for a, b in zip(whole, resumed, strict=True):
        timeless = [{k: v for k, v in r.items() if not k.startswith(("perf/", "time_s"))} for r in (a, b)]
        assert timeless[0] == timeless[1]
