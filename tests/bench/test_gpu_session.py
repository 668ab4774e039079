"""bench/gpu_session.sh: a bad step loses itself only, and its dry form runs on a CPU."""

import os
import subprocess
import time
from pathlib import Path

import pytest

from tests.ranks import write_markov

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "bench" / "gpu_session.sh"

STEPS = """
step fails 20 bash -c 'echo 1 failed; exit 3'
step hangs 1 sleep 300
step ignores 1 bash -c 'trap "" INT TERM; (trap "" INT TERM; sleep 301) &
    while :; do sleep 302; done'
step leaves_children 20 bash -c 'sleep 303 & exit 0'
step good 20 echo 12 passed
END=$(date +%s)
step late 20 echo never
"""


def session(script: Path, out: Path, *, timeout: float, **environment: str) -> dict[str, str]:
    """The summary: name of a step -> the rest of its line."""
    subprocess.run(
        ["bash", str(script)],
        cwd=ROOT,
        env=os.environ | {"OUT": str(out)} | environment,
        capture_output=True,
        timeout=timeout,
        check=False,
    )
    lines = (out / "summary.txt").read_text().splitlines()
    return dict(line.split(": ", 1) for line in lines)


def test_a_step_that_fails_hangs_or_ignores_signals_loses_itself_only(tmp_path):
    head, _, _ = SCRIPT.read_text().partition("\nTRAIN=")
    script = tmp_path / "session.sh"
    script.write_text(head + STEPS)
    begin = time.monotonic()
    summary = session(script, tmp_path / "out", timeout=60)
    assert time.monotonic() - begin < 45
    codes = {name: rest.partition(",")[0] for name, rest in summary.items()}
    assert codes == {
        "fails": "rc 3",
        "hangs": "rc 124",
        "ignores": "rc 137",
        "leaves_children": "rc 0",
        "good": "rc 0",
        "late": "no time left",
    }
    assert summary["good"].endswith("12 passed") and summary["fails"].endswith("1 failed")
    commands = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    assert not {f"sleep {n}" for n in range(300, 304)} & set(commands.splitlines())


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_dry_form_runs_to_its_end_on_a_cpu(tmp_path):
    data = write_markov(tmp_path / "markov", tokens=4000, documents=20)
    out = tmp_path / "out"
    summary = session(SCRIPT, out, timeout=1750, DRY="1", BUDGET="1700", DATA=data)
    assert list(summary) == [
        "env",
        "train_small",
        "triton_kernels",
        "bench_3b_6layers",
        "bench_3b_parts",
        "bench_small",
        "resume_small",
        "fp8_emulate",
    ]
    log = (out / "log.txt").read_text()[-3000:]
    assert all(rest.startswith("rc 0,") for rest in summary.values()), (summary, log)
    assert (out / "a_trace.json.gz").exists() and (out / "3b_parts.json").exists()
