"""v3_tiny's model and recipe on seeded Markov data: the losses of the first 50 steps are on file.

A change of these numbers is a change of what is trained. To accept one, `CC=none python -m
tests.test_golden` rewrites it with torch's own operations; say in the commit why.
"""

import tempfile
from pathlib import Path

import numpy as np
import pytest

from dsv3_mtp.config import load_config
from dsv3_mtp.report.metrics import read_metrics
from tests.ranks import run_ranks, train_to_end, write_markov

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden" / "v3_tiny.txt"
# steps; later the rounding of another CPU or kernel flips a choice of experts, and runs drift apart
# by 1e-3
EXACT = 10
# no choice of experts so close that noise of 1e-7 flips it; of seeds 1 to 4 and v3_tiny's, only
# this one
SEED = 3
COLUMNS = ("train/loss", "train/main_loss", "train/mtp_loss/1", "optim/grad_norm")


def golden_run(folder: Path, name: str) -> list[list[float]]:
    data = write_markov(folder / "markov", tokens=20_000, documents=50, states=64)
    sets = {
        "run.name": name,
        "run.seed": str(SEED),
        "run.dir": str(folder / "runs"),
        "data.train": data,
        "data.val": data,
        "data.build": "null",
        "data.seq_len": "64",
        "train.batch_size": "4",
        "train.micro_batch_size": "4",
        "train.total_tokens": str(50 * 4 * 64),
        "train.threads": "1",
        "eval.every": "0",
        "eval.batches": "1",
        "checkpoint.every": "1000",
        "log.every": "1",
        "log.tensorboard": "false",
    }
    config = load_config(
        ROOT / "configs" / "v3_tiny.yaml", [f"{key}={value}" for key, value in sets.items()]
    )
    assert run_ranks(train_to_end, config, log=folder / f"{name}.log") == [0]
    records = [
        r for r in read_metrics(folder / "runs" / name / "metrics.jsonl") if "train/loss" in r
    ]
    return [[record[column] for column in COLUMNS] for record in records]


@pytest.mark.dist
def test_the_first_50_steps_of_v3_tiny_are_those_on_file(tmp_path):
    losses = golden_run(tmp_path, "first")
    expected = [
        [float(x) for x in line.split()[1:]] for line in GOLDEN.read_text().splitlines()[1:]
    ]
    assert len(losses) == len(expected) == 50
    for step, (got, want) in enumerate(zip(losses[:EXACT], expected, strict=False), start=1):
        assert got == pytest.approx(want, rel=2e-5), f"step {step}"
    for start in range(EXACT, 50, 10):
        got, want = (np.mean(rows[start : start + 10], axis=0) for rows in (losses, expected))
        assert got[:-1] == pytest.approx(want[:-1], rel=1e-3), f"losses after step {start}"
        assert got[-1] == pytest.approx(want[-1], rel=1e-2), f"gradient norm after step {start}"


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        rows = golden_run(Path(folder), "golden")
    lines = [
        f"{step:2d}  " + "  ".join(f"{x:.6f}" for x in row)
        for step, row in enumerate(rows, start=1)
    ]
    GOLDEN.write_text("# step  " + "  ".join(COLUMNS) + "\n" + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
