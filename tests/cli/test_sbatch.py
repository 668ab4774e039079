"""The Slurm scripts are valid shell, say how they are used, and pass on what they are given."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "tools").glob("*.sbatch"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_without_a_file_a_script_says_how_it_is_used(script: Path):
    done = subprocess.run(["bash", script], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("usage: sbatch ")
    assert f"tools/{script.name} " in done.stderr


def run(script: str, tmp_path: Path, *arguments: str, **variables: str) -> tuple[int, str]:
    """Exit code, and the words that the stand-ins for python and torchrun were called with."""
    for name in ("python", "torchrun"):
        (tmp_path / name).write_text(f'#!/bin/bash\necho {name} "$@"\nexit 3\n')
    (tmp_path / "srun").write_text(
        '#!/bin/bash\nwhile [[ $1 == --* ]]; do shift; done\nexec "$@"\n'
    )
    (tmp_path / "scontrol").write_text('#!/bin/bash\necho "$2-of-$3"\n')
    for path in tmp_path.iterdir():
        path.chmod(0o755)
    # VENV: what the scripts activate, and what make hands down where it is set by hand
    environment = {name: value for name, value in os.environ.items() if name != "VENV"}
    environment |= {"PATH": f"{tmp_path}:{os.environ['PATH']}"} | variables
    done = subprocess.run(
        ["bash", ROOT / "tools" / script, *arguments],
        capture_output=True,
        text=True,
        env=environment,
    )
    return done.returncode, done.stdout + done.stderr


def test_the_study_gets_its_settings_and_the_job_its_exit_code(tmp_path: Path):
    words = ["x.yaml", "--only", "v3_step", "--set", "scale=gpu"]
    code, output = run("study.sbatch", tmp_path, *words)
    assert (code, output) == (3, f"python tools/study.py --study {' '.join(words)}\n")


def test_every_node_starts_a_launcher_with_its_rank_and_a_port_of_the_jobs_own(tmp_path: Path):
    slurm = {
        "SLURM_JOB_ID": "40123",
        "SLURM_JOB_NODELIST": "n[1-2]",
        "SLURM_NNODES": "2",
        "SLURM_NODEID": "1",
        "SLURM_GPUS_ON_NODE": "8",
        "SLURM_CPUS_ON_NODE": "64",
    }
    code, output = run("train.sbatch", tmp_path, "x.yaml", "--set", "a.b={c: 1}", **slurm)
    assert code == 3
    assert " ".join(output.split()) == (
        "torchrun --nnodes 2 --node_rank 1 --nproc_per_node 8 --master_addr hostnames-of-n[1-2] "
        "--master_port 20123 tools/train.py --config x.yaml --set a.b={c: 1}"
    )
