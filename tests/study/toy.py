"""A study of seconds: the tiny model on a Markov walk."""

import copy
from pathlib import Path
from typing import Any

import yaml

from dsv3_mtp.study.load import LoadedStudy, load_study
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
    "acceptance": {"prefixes": 2, "prefix_tokens": 4, "new_tokens": 4},
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
