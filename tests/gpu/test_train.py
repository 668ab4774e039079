"""Whole runs on a GPU: tools/train.py in several settings, their resumption, and the tools that
take a run.
"""

import json
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from dsv3_mtp.config import Config
from dsv3_mtp.precision.convert import UNSUPPORTED
from dsv3_mtp.report.metrics import read_metrics
from tests.conftest import TINY_CONFIG
from tests.ranks import timeless, write_markov

ROOT = Path(__file__).parents[2]
CUDA = torch.device("cuda")
STEPS, BATCH, LENGTH = 30, 16, 16
RUNS = {
    "bf16": [],
    "te": ["fp8.enabled=true", "fp8.backend=te"],
    "torch": ["fp8.enabled=true", "fp8.backend=torch"],
    "moments": [
        "optim.moments=bfloat16",
        "train.ema_decay=0.9",
        "train.activation_checkpointing=selective",
    ],
    "offload": ["parallel.zero_stage=2", "parallel.offload_optimizer=true"],
    "zero3": ["parallel.zero_stage=3", "train.activation_checkpointing=full"],
    # q_b_proj is 33 x 29: what comes after it in ZeRO's buffer begins at odd places.
    "unaligned": [
        "model.q_lora_rank=33",
        "model.num_attention_heads=1",
        "model.qk_nope_head_dim=13",
    ],
    "float32": ["parallel.zero_stage=0", "train.dtype=float32"],
}
# Sides of weights are multiples of 16 for FP8. Head widths (28, 12) are none of 8: no fused
# attention takes them, whose backward adds up in any order.
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
    return start_tool(
        "train", "--config", str(config), *(f"--set={text}" for text in sets), log=log
    )


def start_tool(tool: str, *arguments: str, log: Path) -> subprocess.Popen:
    folder = "bench" if tool == "step" else "tools"
    command = [sys.executable, str(ROOT / folder / f"{tool}.py"), *arguments]
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "DS_ACCELERATOR": "cuda"}
    with log.open("w") as out:
        return subprocess.Popen(command, stdout=out, stderr=out, env=environment)


def missing(name: str) -> str | None:
    return UNSUPPORTED[name](CUDA) if name in UNSUPPORTED else None


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The folder of the finished runs, and of the same ones resumed in their middle: NAME and
    NAME_resumed.

    They run side by side, because each spends most of its time on imports. (A fork could not use
    CUDA.)
    """
    folder = tmp_path_factory.mktemp("gpu")
    data = write_markov(folder / "markov", tokens=20000, documents=40)
    sections = {name: dict(values) for name, values in TINY_CONFIG.items()}
    sections["model"] |= MODEL
    sections["run"]["dir"] = str(folder / "runs")
    sections["data"] |= {"train": data, "val": data}
    sections["train"] |= {
        "total_tokens": STEPS * BATCH * LENGTH,
        "batch_size": BATCH,
        "micro_batch_size": BATCH // 2,
    }
    sections["train"] |= {"dtype": "bfloat16"}
    sections["fp8"] = {"enabled": False}
    sections["checkpoint"] = {"every": STEPS // 2, "keep": 2}
    sections["eval"] = {"every": 0, "batches": 1}
    config = folder / "config.yaml"
    config.write_text(Config.model_validate(sections).to_yaml())
    names = [name for name in RUNS if missing(name) is None]
    lost = finish(folder, {name: start(config, name, folder / f"{name}.log") for name in names})
    names = [name for name in names if name not in lost]
    for name in names:
        run = folder / "runs" / f"{name}_resumed"
        shutil.copytree(folder / "runs" / name, run)
        shutil.rmtree(run / "checkpoints" / f"global_step{STEPS}")
        (run / "checkpoints" / "latest").write_text(f"global_step{STEPS // 2}")
    again = [f"{name}_resumed" for name in names]
    lost |= finish(folder, {name: start(config, name, folder / f"{name}.log") for name in again})
    for name, why in lost.items():  # costs the tests of this run alone
        (folder / f"{name}.failed").write_text(why)
    return folder


def finish(
    folder: Path, processes: dict[str, subprocess.Popen], seconds: float = 120
) -> dict[str, str]:
    """Waits for all, and leaves none behind. Why some failed, by name."""
    end, failed = time.monotonic() + seconds, {}
    try:
        for name, process in processes.items():
            try:
                code = process.wait(max(0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                failed[name] = f"{name}: no end in {seconds:.0f} s"
                continue
            if code:
                failed[name] = f"{name}: {(folder / f'{name}.log').read_text()[-3000:]}"
    finally:
        for process in processes.values():
            process.kill()
            process.wait()
    return failed


def steps(folder: Path, name: str) -> list[dict]:
    failed = folder / f"{name.removesuffix('_resumed')}.failed", folder / f"{name}.failed"
    assert not (why := [file.read_text() for file in failed if file.exists()]), why
    return [r for r in read_metrics(folder / "runs" / name / "metrics.jsonl") if "train/loss" in r]


@pytest.fixture(params=RUNS)
def name(request) -> str:
    if reason := missing(request.param):
        pytest.skip(f"fp8.backend: {request.param} {reason}")
    return request.param


def test_losses_are_finite_and_fall(trained, name):
    records = steps(trained, name)
    assert [r["step"] for r in records] == list(range(1, STEPS + 1))
    for key in ("train/main_loss", "train/mtp_loss/1"):
        losses = [r[key] for r in records]
        assert all(map(math.isfinite, losses))
        assert sum(losses[-5:]) < sum(losses[:5]) - 5 * 0.1, losses
    text = (trained / f"{name}.log").read_text()
    assert f"fp8: {name if name in UNSUPPORTED else 'off'}" in text and "attention: " in text


def test_a_resumed_run_repeats_the_uninterrupted_one_bit_for_bit(trained, name):
    whole, resumed = steps(trained, name), steps(trained, f"{name}_resumed")
    assert f"resumed at step {STEPS // 2}" in (trained / f"{name}_resumed.log").read_text()
    assert len(whole) == len(resumed) == STEPS
    assert timeless(whole) == timeless(resumed)


def test_the_tools_evaluate_decode_and_export_a_run(trained):
    run, exported = trained / "runs" / "bf16", trained / "exported"
    generate = (
        "generate",
        "--run",
        str(run),
        "--prompt-ids=5 9",
        "--prompt-ids=7 1 3 2",
        "--max-new-tokens=8",
    )
    evaluate = ("evaluate", "--run", str(run), "--json", "--batches=1", "--new-tokens=8")
    processes = {
        "evaluate": start_tool(*evaluate, log=trained / "evaluate.log"),
        "plain": start_tool(*generate, log=trained / "plain.log"),
        "drafts": start_tool(
            *generate, "--speculative", "--draft-depth=2", log=trained / "drafts.log"
        ),
        "sampled": start_tool(
            *generate, "--speculative", "--temperature=1", log=trained / "sampled.log"
        ),
        "export": start_tool(
            "export_hf", "--run", str(run), "--out", str(exported), log=trained / "export.log"
        ),
    }
    assert not finish(trained, processes)
    text = (trained / "evaluate.log").read_text()
    (metrics,) = json.loads(text[text.index("{") :]).values()
    last = [r for r in read_metrics(run / "metrics.jsonl") if "val/main_loss" in r][-1]
    assert metrics["val/main_loss"] == pytest.approx(last["val/main_loss"], rel=1e-3)
    assert metrics["val/tokens_per_step"] >= 1
    assert "drafts accepted" in (trained / "drafts.log").read_text()
    assert (exported / "model.safetensors.index.json").is_file()


def test_the_benchmark_compares_and_times_the_parts(tmp_path):
    """Of variants that cannot run here it says so."""
    model = [f"--set=model.{key}={value}" for key, value in (TINY_CONFIG["model"] | MODEL).items()]
    sets = [
        *model,
        "--set=data.seq_len=16",
        "--set=train.micro_batch_size=2",
        "--set=train.batch_size=2",
    ]
    sets += ["--set=mtp.mode=none", "--set=train.dtype=bfloat16"]
    numbers = tmp_path / "numbers.json"
    compared = ("step", *sets, "--against", "fp8", "--parts", "--rounds=2", "--json")
    processes = {"compare": start_tool(*compared, str(numbers), log=tmp_path / "compare.log")}
    assert not finish(tmp_path, processes)
    found = json.loads(numbers.read_text())
    own = found["variants"]["dsv3_mtp"]
    # not that of the products it is compared with
    assert 0 < own["mfu"] < 1 and 0 < own["peak_bytes"] < 2**28
    assert min(found["parts"].values()) > 0
