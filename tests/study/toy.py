"""A study of seconds: the tiny model on a Markov walk; and records of its runs, written by hand."""

import copy
from pathlib import Path
from typing import Any

import yaml

from dsv3_mtp.study.archive import Curve, RunRecord, Start, write_results
from dsv3_mtp.study.expand import Run, expand
from dsv3_mtp.study.load import LoadedStudy, load_study
from dsv3_mtp.study.measure import describe
from tests.conftest import tiny
from tests.ranks import write_markov

STEPS = 8

TOY: dict[str, Any] = {
    "run": {"name": "toy", "dir": ""},
    "question": "Does it work?",
    "expectation": "It does.",
    "scales": {"cpu": {"base": "base.yaml", "flops_per_s": 1e9}},
    "seeds": [1, 2],
    "arms": {
        "constant": {"about": "lambda 0.3", "set": {"mtp.loss_weight": 0.3}},
        "step": {
            "about": "0.3, then 0",
            "set": {"mtp.loss_weight": {"type": "step", "values": [0.3, 0.0], "at": [0.6]}},
        },
        "none": {"about": "no heads", "set": {"mtp.mode": "none"}},
    },
    "comparisons": {
        "heads": {"against": "none", "arms": ["constant"], "rule": "added parameters"},
        "schedule": {"against": "constant", "arms": ["step"], "rule": "same model"},
    },
    "primary": {"metric": "val/main_loss", "comparison": "heads", "margin": 0.01},
    "metrics": ["acceptance/T0/tokens_per_step"],
    "acceptance": {"prefixes": 2, "prefix_tokens": 4, "new_tokens": 4, "draws": 2},
}


def write_toy(folder: Path, change=lambda tree: None) -> Path:
    """study.yaml, its base and its data in `folder`; `change` edits the study's tree first."""
    data = write_markov(folder / "data" / "markov", tokens=3000, documents=40)
    base = {
        "data.train": data,
        "data.val": data,
        "train.total_tokens": STEPS * 4 * 16,
        "train.dtype": "float32",
    }
    base |= {
        "checkpoint.every": 2,
        "checkpoint.keep": 1,
        "eval.batches": 1,
        "parallel.zero_stage": 0,
    }
    (folder / "base.yaml").write_text(tiny(base).to_yaml())
    tree = copy.deepcopy(TOY)
    tree["run"]["dir"] = str(folder / "runs")
    change(tree)
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return path


def load_toy(folder: Path, change=lambda tree: None) -> LoadedStudy:
    return load_study(write_toy(folder, change))


def five_seeds(tree) -> None:
    tree["seeds"] = [1, 2, 3, 4, 5]
    tree["metrics"] = ["acceptance/T1/tokens_per_step"]
    tree["comparisons"]["drafting"] = {
        "against": "constant",
        "arms": ["step"],
        "rule": "same model",
    }


START = Start(
    time="2026-01-01T00:00:00+0000",
    commit="abc",
    dirty=False,
    python="3",
    versions={"torch": "2", "deepspeed": "0"},
    device="cpu",
    threads=1,
    data={"val": {"path": "x", "hash": "0123456789abcdef"}},  # type: ignore[dict-item]
)


def record_of(loaded: LoadedStudy, run: Run, metrics: dict[str, float], **more: Any) -> RunRecord:
    """What a run came to, as if it had been trained and measured."""
    bare = describe(loaded.study, run, [], [START])
    last = metrics.get("val/main_loss", 4.0)
    tokens = [100 * n for n in range(1, 6)]
    curves = {
        "val/main_loss": Curve(tokens=tokens, values=[last + (5 - n) / 10 for n in range(1, 6)]),
        "moe/max_violation": Curve(tokens=tokens, values=[1.0] * 5),
    }
    fields = {"metrics": metrics, "curves": curves, "seconds_per_token": 1e-3}
    return RunRecord.model_validate(bare.model_dump() | fields | more)


def write_run(loaded: LoadedStudy, run: Run, metrics: dict[str, float], **more: Any) -> None:
    folder = loaded.study.folder / run.name
    folder.mkdir(parents=True, exist_ok=True)
    write_results(folder, record_of(loaded, run, metrics, **more))


NOISE = (0.0, 0.02, -0.01, 0.01, -0.02)
JITTER = (0.003, -0.001, 0.002, -0.002, 0.001)


def write_runs(loaded: LoadedStudy, losses: dict[str, float], *, drafts: float = 1.5) -> None:
    """losses: arm -> main loss of its mean seed; an arm that is missing has not been run."""
    for run in expand(loaded, {}):
        if run.arm in losses:
            n = run.seed - 1
            value = losses[run.arm] + NOISE[n] + (JITTER[n] if run.arm != "none" else 0.0)
            metrics = {"val/main_loss": value}
            if run.arm != "none":
                metrics |= {
                    "val/mtp_loss/1": value + 0.1,
                    "acceptance/T0/joint/1": 0.5,
                    "acceptance/T1/joint/1": 0.6,
                }
                metrics |= {f"acceptance/T{t}/tokens_per_step": drafts + NOISE[n] for t in (0, 1)}
            write_run(loaded, run, metrics)
