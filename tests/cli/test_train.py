"""tools/train.py from the outside: launchers, exit codes, messages, signals."""

import base64
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from dsv3_mtp.report.metrics import read_metrics
from tests.ranks import run_tool, write_markov

ROOT = Path(__file__).parents[2]
TRAIN = ROOT / "tools" / "train.py"
BIN = Path(sys.executable).parent


@pytest.fixture
def job(tmp_path, make_tiny_config):
    """Path of the YAML of a 20-step run on Markov data; the run's folder is tmp_path/runs/job."""
    data = write_markov(tmp_path / "markov", tokens=3000, documents=40)
    config = make_tiny_config(
        {
            "run.name": "job",
            "run.dir": str(tmp_path / "runs"),
            "data.train": data,
            "data.val": data,
            "train.dtype": "float32",
            "train.total_tokens": 20 * 4 * 16,
            "train.micro_batch_size": 2,
            "log.tensorboard": True,
        }
    )
    path = tmp_path / "job.yaml"
    path.write_text(config.to_yaml())
    return path


def start(command: list[str], log: Path) -> subprocess.Popen:
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "DS_ACCELERATOR": "cpu",
    }
    with log.open("w") as out:
        return subprocess.Popen(
            command, stdout=out, stderr=out, env=environment, start_new_session=True
        )


def finish(command: list[str], log: Path, timeout: float = 120) -> tuple[int, str]:
    """Exit code and output; whatever is left of the job after `timeout` is killed."""
    process = start(command, log)
    try:
        return process.wait(timeout), log.read_text()
    finally:
        for left in psutil.Process().children(recursive=True):
            if left.pid != process.pid and str(log.parent) in " ".join(left.cmdline()):
                left.kill()


def deepspeed(job: Path, *options: str) -> list[str]:
    from tests.ranks import free_port

    launcher = [str(BIN / "deepspeed"), "-q", *options, "--master_port", str(free_port())]
    return [*launcher, str(TRAIN), "--config", str(job)]


@pytest.mark.dist
@pytest.mark.slow
def test_the_launcher_trains_to_the_end_and_prints_only_our_lines(job):
    """deepspeed with two ranks: below."""
    code, output = finish(deepspeed(job), job.with_suffix(".log"))
    assert code == 0, output
    folder = job.parent / "runs" / "job"
    assert f"results: {folder}" in output
    assert "finished: 20 steps" in output and "1 x cpu" in output
    noise = ("shm", "[INFO]", "[WARNING]", "Traceback", "FutureWarning", "DeepSpeed info")
    assert not [line for line in output.splitlines() if any(word in line for word in noise)]
    assert [r["step"] for r in read_metrics(folder / "metrics.jsonl") if "train/loss" in r] == list(
        range(1, 21)
    )
    (events,) = (folder / "tb").glob("events.out.tfevents.*")
    # DeepSpeed's own x axis
    assert b"optim/lr" in events.read_bytes() and b"Train/Samples" not in events.read_bytes()
    assert (folder / "curves.png").stat().st_size > 20_000
    json.loads((folder / "ds_config.json").read_text())


def test_bad_input_exits_2_with_all_reasons_and_no_traceback(job):
    """One of them; the others stand in tests/bad_inputs."""
    wrong = ("--set", "train.batch_size=0", "--set", "model.n_group=3")
    code, output = run_tool(TRAIN, "--config", str(job), *wrong, log=job.with_suffix(".log"))
    assert code == 2 and "2 problems" in output and "Traceback" not in output, output
    assert not (job.parent / "runs").exists()


def test_dry_run_prints_sizes_first_the_config_on_request_and_starts_nothing(job):
    options = ("--config", str(job), "--dry-run", "--plot", "--yaml")
    code, output = run_tool(TRAIN, *options, log=job.with_suffix(".log"))
    assert code == 0, output
    sizes, memory, sent, config, ds_json = output.split("# ")[1:6]
    assert config.startswith("config\n") and "num_nextn_predict_layers: 1" in config
    assert "parameters, main model" in sizes and "FLOP" in sizes
    assert (
        memory.startswith("memory of one rank, 1 rank; ZeRO-1")
        and "fits in 8 GiB" in memory
        and "gradients" in sent
    )
    assert json.loads(ds_json.partition("\n")[2].rpartition("}")[0] + "}")["zero_optimization"] == {
        "stage": 1
    }
    folder = job.parent / "runs" / "job"
    assert [path.name for path in folder.iterdir()] == ["schedules.png"]


def test_dry_run_plans_v3_on_2048_gpus(tmp_path):
    plan = ["--config", str(ROOT / "configs" / "v3_671b.yaml"), "--dry-run"]
    code, output = run_tool(TRAIN, *plan, "--world-size", "2048", log=tmp_path / "log")
    assert code == 0, output
    assert "2048 ranks; 16 pipeline stages x 128; experts over 64 ranks, 2 copies; ZeRO-1" in output
    plan_of_2048 = output
    assert "# config" not in output
    assert "fits in 96 GiB" in output and "1F1B (run here)  11.1%" in output
    code, output = run_tool(TRAIN, *plan, log=tmp_path / "log")
    assert (
        code == 2
        and "parallel.pipeline_stages: must divide the number of ranks, 1 (got 16)" in output
    )
    assert "--world-size: the nearest that fit are 1,024" in output
    # 3.858e24 FLOPs at 40 % of 989 TFLOP/s
    assert "H100 hours" in plan_of_2048 and " on 2,048), if 40% of 989" in plan_of_2048


@pytest.mark.dist
@pytest.mark.slow
def test_sigterm_to_the_launcher_saves_and_the_same_command_finishes(job):
    """The launcher dies of it, which its ranks notice; tests/test_trainer.py sends it to the ranks
    themselves.
    """
    # a run that outlasts the test
    job.write_text(job.read_text().replace("total_tokens: 1280", "total_tokens: 64000"))
    process = start(deepspeed(job, "--num_gpus", "2"), job.with_suffix(".log"))
    folder = job.parent / "runs" / "job"
    wait_for(
        lambda: (
            (folder / "metrics.jsonl").exists() and len(read_metrics(folder / "metrics.jsonl")) > 2
        )
    )
    ranks = psutil.Process(process.pid).children()[0].children()
    process.send_signal(signal.SIGTERM)
    process.wait(30)
    psutil.wait_procs(ranks, timeout=30)
    assert not any(rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE for rank in ranks), (
        "orphans"
    )
    output = job.with_suffix(".log").read_text()
    stopped = max(r["step"] for r in read_metrics(folder / "metrics.jsonl"))
    assert (folder / "checkpoints" / "latest").read_text() == f"global_step{stopped}", output
    more = ["--config", str(job), "--set", f"train.total_tokens={(stopped + 2) * 64}"]
    code, output = run_tool(TRAIN, *more, world_size=2, log=job.with_suffix(".log"))
    assert (
        code == 0
        and f"resumed at step {stopped}" in output
        and f"finished: {stopped + 2} steps" in output
    )


@pytest.mark.dist
@pytest.mark.slow
def test_two_nodes_train_as_one_rank_does_and_end_together_when_a_rank_is_killed(job):
    """What `deepspeed --hostfile` starts on each node, twice on one host. Killing one rank ends
    both, and the next start, of any shape, goes on.
    """
    from tests.ranks import free_port

    folder, port = job.parent / "runs" / "job", str(free_port())
    job.write_text(job.read_text().replace("total_tokens: 1280", "total_tokens: 64000"))
    constant = [
        "optim.schedule={warmup: 0, decay_start: 1, decay_end: 1, final_start: 1}",
        "mtp.loss_weight=0.3",
    ]
    settings = [
        "--config",
        str(job),
        *(word for text in constant for word in ("--set", text)),
    ]  # whatever the length
    hosts = base64.urlsafe_b64encode(json.dumps({"first": [0], "second": [0]}).encode()).decode()
    nodes = []
    for node in range(2):
        at = [
            "--node_rank",
            str(node),
            "--master_addr",
            "127.0.0.1",
            "--master_port",
            port,
            f"--world_info={hosts}",
        ]
        command = [sys.executable, "-m", "deepspeed.launcher.launch", *at, str(TRAIN), *settings]
        nodes.append(start(command, job.with_suffix(f".node{node}.log")))
    wait_for(lambda: (folder / "checkpoints" / "latest").exists())
    ranks = [psutil.Process(node.pid).children()[0] for node in nodes]
    ranks[1].kill()
    assert all(node.wait(60) != 0 for node in nodes)
    assert not any(rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE for rank in ranks)
    trained = max(r["step"] for r in read_metrics(folder / "metrics.jsonl"))
    short = [*settings, "--set", f"train.total_tokens={64 * (trained + 2)}"]
    code, output = run_tool(TRAIN, *short, world_size=2, log=job.with_suffix(".log"))
    assert code == 0 and "resumed at step" in output, output
    alone = [*short, "--set", "run.name=alone"]
    code, output = run_tool(TRAIN, *alone, log=job.with_suffix(".log"))
    assert code == 0, output
    losses = [
        [
            r["train/loss"]
            for r in read_metrics(job.parent / "runs" / name / "metrics.jsonl")
            if "train/loss" in r
        ]
        for name in ("job", "alone")
    ]
    assert losses[0][:10] == pytest.approx(losses[1][:10], abs=1e-5)


@pytest.mark.dist
def test_one_process_without_a_launcher_trains_with_zero_3(job):
    settings = ["--config", str(job), "--set", "parallel.zero_stage=3"]
    settings += ["--set", "train.total_tokens=128", "--set", "eval.every=1"]
    code, output = run_tool(TRAIN, *settings, log=job.with_suffix(".log"))
    assert code == 0, output


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize(("seconds", "saved"), [("1", False), ("100", True)])
def test_torchrun_waits_for_a_long_step_as_tools_train_sbatch_tells_it_to(
    job, monkeypatch, seconds, saved
):
    """SIGTERM in the middle of a step of several seconds. torchrun's own patience is 30 s."""
    sbatch = (ROOT / "tools" / "train.sbatch").read_text()
    assert "export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600" in sbatch
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", seconds)
    long = ["train.batch_size=384", "train.total_tokens=1000000", "checkpoint.every=1000"]
    sets = [word for text in long for word in ("--set", text)]
    launcher = [str(BIN / "torchrun"), "--nproc_per_node", "1", "--standalone"]
    log, folder = job.with_suffix(".log"), job.parent / "runs" / "job"
    process = start([*launcher, str(TRAIN), "--config", str(job), *sets], log)
    wait_for(lambda: "step " in log.read_text())
    rank = psutil.Process(process.pid).children()[0]
    process.send_signal(signal.SIGTERM)
    process.wait(120)
    psutil.wait_procs([rank], timeout=30)
    assert ("by SIGTERM; the same command continues" in log.read_text()) == saved
    assert (folder / "checkpoints" / "latest").exists() == saved


def wait_for(condition, timeout: float = 90) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.1)
