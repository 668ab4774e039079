"""bench/step.py: that both sides of a comparison train the same thing, and what it prints and
refuses.
"""

import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch

from tests.conftest import TINY_CONFIG
from tests.ranks import run_tool

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "bench"))  # as Python does for a script
import child  # noqa: E402
import startup  # noqa: E402
import step as tool  # noqa: E402
import step_child as bench  # noqa: E402
import timing  # noqa: E402

bench.DEVICE = torch.device("cpu")
CPU = torch.device("cpu")

SETS = [f"--set=model.{key}={value}" for key, value in TINY_CONFIG["model"].items()]
SETS += ["--set=data.seq_len=16", "--set=train.micro_batch_size=2", "--set=train.batch_size=2"]


def run_bench(folder: Path, *arguments: str) -> tuple[int, str]:
    return run_tool(ROOT / "bench/step.py", *SETS, *arguments, log=folder / "log")


def test_transformers_starts_from_the_same_weights_and_batch_and_learns_alike(make_tiny_config):
    optim = {"lr": 1e-2, "betas": [0.5, 0.6], "weight_decay": 10.0, "eps": 1e-4}
    config = make_tiny_config({"mtp.mode": "none", "train.dtype": "float32"}).to_dict()
    config["optim"] |= optim
    config["train"]["balance_loss_weight"] = 0.0  # transformers has none
    common = {"config": config, "tuned": True, "compiled": False}
    steps = [bench.build({"kind": kind, **common})[0] for kind in ("ours", "transformers")]
    losses = [[step().item() for _ in range(3)] for step in steps]
    assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-6)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)  # the same optimizer, too


def test_the_parts_of_a_step_are_all_timed(make_tiny_config):
    config = make_tiny_config()
    spec = {"kind": "ours", "config": config.to_dict(), "tuned": False, "compiled": False}
    _, model, optimizer, _ = bench.build(spec)
    bench.build(spec)[0]()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    parts = bench.parts(model, optimizer, config)
    names = ["attention", "MoE", "dense feed-forward", "norms", "output head and loss", "optimizer"]
    assert list(parts) == names and min(parts.values()) > 0


def test_a_shared_module_counts_as_often_as_a_step_runs_it(make_tiny_config, monkeypatch):
    monkeypatch.setattr(bench, "timed", lambda function, device: 1.0)
    config = make_tiny_config({"mtp.num_nextn_predict_layers": 2, "mtp.share_weights": True})
    _, model, optimizer, _ = bench.build(
        {"kind": "ours", "config": config.to_dict(), "tuned": False, "compiled": False}
    )
    parts = bench.parts(model, optimizer, config)
    # Three trunk layers, the first dense, and one module twice, which has five norms; a layer has
    # two, the end one.
    counts = [parts[name] for name in ("attention", "MoE", "dense feed-forward", "norms")]
    assert counts == [5, 4, 1, 3 * 2 + 1 + 2 * 5]


def test_several_threads_are_timed_by_the_wall_clock_whose_seconds_do_not_add_up(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert timing.clock(CPU) == "wall" and timing.timed(lambda: time.sleep(0.1), CPU) >= 0.1
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert timing.clock(CPU) == "CPU" and timing.timed(lambda: time.sleep(0.1), CPU) < 0.1


def test_a_frozen_trunk_stays_as_it_is(make_tiny_config):
    frozen = {
        "train.freeze": "trunk",
        "train.init_from": "there",
        "mtp.detach": "trunk",
        "train.dtype": "bfloat16",
    }
    spec = {
        "kind": "ours",
        "config": make_tiny_config(frozen).to_dict(),
        "tuned": False,
        "compiled": False,
    }
    step, model, _, _ = bench.build(spec)
    losses = [step().item() for _ in range(2)]
    assert losses[0] == losses[1] and model.lm_head.weight.grad is None


@pytest.mark.slow
def test_a_comparison_prints_a_table_and_writes_the_numbers_and_says_which_fp8_backend_cannot_run(
    tmp_path,
):
    code, output = run_bench(
        tmp_path,
        "--against",
        "plain",
        "fp8",
        "--rounds=2",
        "--set=train.batch_size=4",
        f"--json={tmp_path / 'out.json'}",
    )
    assert code == 0 and "without tuning" in output and "1.00x" in output, output
    assert "freed memory is kept" in output  # products, parts and notes are those of the tuned row
    assert "a step here is one micro-batch of 2 rows" in output
    rows = json.loads((tmp_path / "out.json").read_text())["variants"]
    plain, own = rows["dsv3_mtp without tuning"], rows["dsv3_mtp"]
    assert own["losses"] == pytest.approx(plain["losses"], rel=1e-4)
    assert own["flop_ratio"] == 1 and own["peak_bytes"] > 0 and 0 < own["mfu"] < 1
    lines = output.splitlines()
    assert any(line.startswith("dsv3_mtp  ") for line in lines)
    for backend in ("te", "torch"):
        reason = (
            f"not run: dsv3_mtp FP8 by {backend}: ValueError: "
            f"fp8.backend: {backend} needs a Hopper GPU"
        )
        assert any(line.startswith(reason) for line in lines)


def test_in_bfloat16_both_dtypes_stand_against_transformers_in_float32(
    make_tiny_config, monkeypatch
):
    config = make_tiny_config({"mtp.mode": "none", "train.dtype": "bfloat16"}).to_dict()
    options = SimpleNamespace(against=["transformers"], compile=False, parts=False)
    rows = [
        (name, spec["config"]["train"]["dtype"], spec["tuned"])
        for name, spec in tool.variants(config, options)
    ]
    assert rows == [
        ("transformers", "float32", False),
        ("transformers, tuned", "float32", True),
        ("transformers bfloat16, tuned", "bfloat16", True),
        ("dsv3_mtp float32", "float32", True),
        ("dsv3_mtp", "bfloat16", True),
    ]


def test_heads_against_transformers_are_refused_with_the_remedy(tmp_path):
    code, output = run_bench(tmp_path, "--against=transformers")
    assert code == 2
    assert (
        output.strip()
        == "error: --against transformers: it trains no MTP heads; add --set mtp.mode=none"
    )


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (
            {"model.n_shared_experts": 0},
            "model.n_shared_experts: 0: the layout has no MoE layer without shared experts",
        ),
        ({"model.rms_norm_eps": 1e-2}, "model.rms_norm_eps 0.01: .* with 1e-06 in transformers"),
    ],
)
def test_what_transformers_computes_otherwise_is_refused(
    make_tiny_config, monkeypatch, settings, reason
):
    config = make_tiny_config({"mtp.mode": "none"} | settings).to_dict()
    options = SimpleNamespace(against=["transformers"], compile=False, parts=False)
    with pytest.raises(ValueError, match=reason):
        tool.variants(config, options)


def test_depths_are_compared_for_a_run_with_any_heads(make_tiny_config, monkeypatch):
    options = SimpleNamespace(against=["depths"], compile=False, parts=False)
    own = {"share_weights": True, "detach": "trunk", "depth_weights": [1.0], "chain": "trunk"}
    config = make_tiny_config({f"mtp.{key}": value for key, value in own.items()}).to_dict()
    assert len(tool.variants(config, options)) == 7
    missing = tool.left_out(config, options)[0]
    assert (
        missing == "not in these steps: mtp.depth_weights, mtp.detach, mtp.chain, mtp.share_weights"
    )


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (
            ["--against", "depths", "plain"],
            "--against depths: measures something of its own; leave out --against plain",
        ),
        (
            ["--json", "missing/numbers.json"],
            "--json missing/numbers.json: must be a file in a folder that is there",
        ),
    ],
)
def test_options_that_would_be_ignored_or_fail_at_the_end_are_refused(
    monkeypatch, capsys, arguments, reason
):
    monkeypatch.setattr(sys, "argv", ["bench.py", *arguments])
    with pytest.raises(SystemExit):
        tool.parse()
    assert reason in capsys.readouterr().err


@pytest.mark.parametrize("task", [None, {"type": "suffix_sum", "terms": 2, "modulus": 3}])
def test_startup_is_given_tokens_that_the_model_knows_or_the_task(
    make_tiny_config, monkeypatch, task
):
    specs = []

    def answer(self: child.Child) -> list:
        specs.append(self.spec["sets"])
        for text in self.spec["sets"]:
            if text.startswith("data.train="):
                ids = np.fromfile(text.removeprefix("data.train=") + ".bin", np.uint16)
                assert ids.max() < 64
        return [["python", 1.0]]

    monkeypatch.setattr(child.Child, "start", lambda self, threads: None)
    monkeypatch.setattr(child.Child, "answer", answer)
    config = SimpleNamespace(model=make_tiny_config().model, data=SimpleNamespace(task=task))
    assert "python" in (text := startup.startup(config, "run.yaml", [], 1)) and "1.00 CPU-s" in text
    assert sum(text.startswith("data.train=") for text in specs[0]) == (task is None)


def script(tmp_path: Path, code: str) -> str:
    """A child's program, as a path below bench/."""
    path = tmp_path / "program.py"
    path.write_text(f"import sys; sys.path.insert(0, {str(ROOT / 'bench')!r})\n{code}")
    return str(path)


def test_a_killed_process_is_reported_by_its_exit_code(tmp_path):
    killed = child.Child("dsv3_mtp", script(tmp_path, "import os; os.kill(os.getpid(), 9)"), {})
    killed.start(1)
    with pytest.raises(child.ChildError, match="dsv3_mtp: ended without a word, exit code -9"):
        killed.ask("step")


def test_a_child_that_does_not_answer_in_time_is_ended(tmp_path):
    slow = child.Child("slow", script(tmp_path, "import time; time.sleep(60)"), {}, limit=0.5)
    slow.start(1)
    with pytest.raises(child.ChildError, match="slow: no answer in 0 s"):
        slow.ask("step")
    assert slow.process.returncode == -15


def test_a_child_ends_with_its_parent_in_the_middle_of_something(tmp_path):
    code = """import child, os, time
child.serve(lambda spec: ({"pid": os.getpid()}, {"step": lambda _: time.sleep(60)}))"""
    path = script(tmp_path, code)
    parent = f"""import sys; sys.path.insert(0, {str(ROOT / "bench")!r})
import child, os
one = child.Child("one", {path!r}, {{}})
one.start(1)
print(one.answer()["pid"], flush=True)
one.tell("step")
os.kill(os.getpid(), 9)"""
    done = subprocess.run([sys.executable, "-c", parent], capture_output=True, text=True)
    assert done.returncode == -9
    deadline = time.monotonic() + 10
    while psutil.pid_exists(int(done.stdout)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not psutil.pid_exists(int(done.stdout))


def test_turns_interleave_and_a_ratio_is_of_the_same_round():
    calls: list[str] = []
    variants = {name: (lambda name=name: calls.append(name)) for name in ("a", "b")}
    seconds = timing.interleave(variants, 3, CPU)
    assert [sorted(calls[i : i + 2]) for i in range(0, 8, 2)] == [["a", "b"]] * 4
    assert {name: len(times) for name, times in seconds.items()} == {"a": 3, "b": 3}
    assert timing.ratios([2.0, 4.0, 6.0], [1.0, 2.0, 3.0]) == [2.0, 2.0, 2.0]


def test_kernels_are_timed_one_by_one_and_what_cannot_run_says_why(tmp_path):
    tool, config = ROOT / "bench/kernels.py", ["--config", str(ROOT / "configs/v3_nano.yaml")]
    code, output = run_tool(tool, *config, "--tokens=128", "--rounds=1", log=tmp_path / "log")
    assert code == 0, output
    rows = output.splitlines()
    for name in (
        "linear",
        "experts",
        "attention",
        "rotary heads",
        "residual and norm",
        "head and loss",
    ):
        assert any(name in row and row.endswith("1.00x") for row in rows), name
    assert any("fp8.backend: te needs a Hopper GPU" in row for row in rows)
    code, output = run_tool(tool, *config, "--tokens=100", "lniear", log=tmp_path / "wrong")
    assert code == 2 and "no such part: lniear" in output
    code, output = run_tool(tool, *config, "--rounds=0", log=tmp_path / "none")
    assert code == 2 and "--rounds 0: must be at least 1" in output


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["refusals", "--set=foo=1"], "foo: unknown key"),
        (["memory"], "memory: start it with torchrun --nproc_per_node 2"),
        (["scaling", "--steps=0"], "--steps 0: must be at least 1"),
    ],
)
def test_tables_of_layouts_say_what_they_need(tmp_path, monkeypatch, arguments, reason):
    monkeypatch.delenv("RANK", raising=False)
    code, output = run_tool(ROOT / "bench/parallel.py", *arguments, log=tmp_path / "log")
    assert code == 2 and reason in output and "Traceback" not in output, output
