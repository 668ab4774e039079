"""Every kind of head trains in every layout as on one process: losses, gradient norms, validation.

pytest tests/parallel/test_heads.py -s        prints the largest differences
"""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from dsv3_mtp.config import Config
from dsv3_mtp.config.layout import rank_problems
from dsv3_mtp.train.trainer import Trainer
from dsv3_mtp.train.validation import evaluate
from tests.conftest import tiny
from tests.heads_under_test import KINDS
from tests.ranks import chosen, run_ranks, write_markov

STEPS = 2
LAYOUTS: dict[str, dict[str, Any]] = {
    "PP=2": {"parallel.pipeline_stages": 2, "parallel.zero_stage": 1},
    "EP=2": {"parallel.expert_parallel_size": 2, "parallel.zero_stage": 2},
    "SP=2": {"parallel.sequence_parallel_size": 2, "parallel.zero_stage": 1},
    "ZeRO-3": {"parallel.zero_stage": 3},
}
CASES = [(kind, layout) for kind in KINDS for layout in LAYOUTS]
# Each kind in one layout in turn, so that heads of a file, which come last, meet all four; the
# others are slow. One process takes two micro-batches of what two ranks take as one or two.
QUICK = {(kind, [*LAYOUTS][number % len(LAYOUTS)]) for number, kind in enumerate(KINDS)}
QUICK |= {("InnerHead", "PP=2")}


def make_config(folder: Path, data: str, kind: str, layout: dict[str, Any]) -> Config:
    settings = {
        "run.dir": str(folder),
        "data.train": data,
        "data.val": data,
        "data.mask_documents": True,
        "mtp.num_nextn_predict_layers": 2,
        "optim.grad_clip": 0.3,  # far below the norm: every step is clipped
        "optim.eps": 1e-5,  # Adam divides by the gradient: with less, rounding errors become steps
        "train.dtype": "float32",
        "train.total_tokens": 20 * 4 * 16,
        "train.batch_size": 4,
        "train.micro_batch_size": 2,
        "train.balance_loss_weight": 0.01,
        "eval.batches": 3,  # not a multiple of the ranks
    }
    return tiny(settings | KINDS[kind] | layout)


def train(jobs: list[tuple[Config, str]]) -> None:
    for config, file in jobs:
        trainer = Trainer(config, command=["test"])
        records = [trainer.optimizer_step()[0] for _ in range(STEPS)]
        seen = {"records": records, "val": evaluate(trainer.engine, trainer.val, config)}
        torch.save(seen, f"{file}.{os.environ['RANK']}")


@pytest.fixture(scope="module")
def found(tmp_path_factory, request) -> dict[tuple[str, str], dict[str, Any]]:
    """What every kind saw on one process and in every layout that is asked for and takes it."""
    folder, found, cases = tmp_path_factory.mktemp("heads"), {}, chosen(request, "kind", "layout")
    cases = [*((kind, "one process") for kind in dict(cases)), *cases]
    data = write_markov(folder / "markov", tokens=3000, documents=40)
    for number, (layout, keys) in enumerate({"one process": {}, **LAYOUTS}.items()):
        ranks, jobs = 2 if keys else 1, {}  # of one layout: DeepSpeed keeps what a pipeline sets
        for kind in KINDS:
            if (kind, layout) in cases and (kind, layout) != ("InnerHead", "PP=2"):
                config = make_config(folder / f"{number}-{kind}", data, kind, keys)
                assert rank_problems(config, ranks) == []
                jobs[kind] = config, str(folder / f"seen-{number}-{kind}")
        if not jobs:
            continue
        log = folder / f"{number}.log"
        codes = run_ranks(train, list(jobs.values()), world_size=ranks, log=log, timeout=280)
        text = "".join(Path(f"{log}.rank{rank}").read_text() for rank in range(ranks))
        assert codes == [0] * ranks, text
        for kind, (_, file) in jobs.items():
            seen = [torch.load(f"{file}.{rank}") for rank in range(ranks)]
            assert all(one == seen[0] for one in seen)
            found[kind, layout] = seen[0]
    return found


@pytest.mark.dist
@pytest.mark.parametrize(
    ("kind", "layout"),
    [case if case in QUICK else pytest.param(*case, marks=pytest.mark.slow) for case in CASES],
)
def test_a_layout_computes_what_one_process_does(kind: str, layout: str, found):
    if (kind, layout) not in found:
        config = {"mtp.mode": KINDS[kind]["mtp.mode"], **LAYOUTS[layout]}
        with pytest.raises(ValueError, match="read the output of trunk layer 0, which the last"):
            tiny(config)
        return
    want, got = found[kind, "one process"], found[kind, layout]
    worst = 0.0
    for mine, theirs in zip(got["records"], want["records"], strict=True):
        assert mine.keys() == theirs.keys()
        assert mine == pytest.approx(theirs, rel=2e-5, abs=1e-7)
        losses = [key for key in mine if "loss" in key or "term" in key]
        worst = max(worst, *(abs(mine[key] - theirs[key]) for key in losses))
    assert got["val"] == pytest.approx(want["val"], rel=2e-5)
    last = got["records"][-1]
    print(f"\n| {kind:16} | {layout:8} | {last['train/loss']:.6f} | {worst:.1e} |", end="")
