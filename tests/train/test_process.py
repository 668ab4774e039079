"""The package changes nothing of the process that imports it or builds a Trainer: what it does to a
process of its own stands in train/process.py.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ranks import write_markov

ROOT = Path(__file__).resolve().parents[2]
LOOK = """
import importlib, json, os, pkgutil, signal, sys, warnings
import deepspeed, matplotlib, sympy, torch, torch.distributed  # what they change is theirs

def look():
    return {
        "environment": dict(os.environ),
        "signals": {str(s): str(signal.getsignal(s)) for s in signal.valid_signals()},
        "precision": torch.get_float32_matmul_precision(),
        "filters": [str(entry) for entry in warnings.filters],
        "timeout": str(torch.distributed.distributed_c10d.default_pg_timeout),
        "dtype": str(torch.get_default_dtype()),
    }

before = look()
"""
IMPORT_ALL = """
import dsv3_mtp
for module in pkgutil.walk_packages(dsv3_mtp.__path__, "dsv3_mtp."):
    if module.name != "dsv3_mtp.__main__" and "triton" not in module.name:
        importlib.import_module(module.name)
"""
BUILD = """
from dsv3_mtp import Trainer, load_config
trainer = Trainer(load_config(sys.argv[1]), command=[])
trainer.optimizer_step()
"""
OWN = """
from dsv3_mtp import load_config
from dsv3_mtp.train.process import own_process
own_process(load_config(sys.argv[1]), command=[]).optimizer_step()
"""


def changes(code: str, *arguments: str) -> dict:
    """What `code` changes in a process of its own: name -> [before, after]."""
    report = "print('CHANGES', json.dumps([before, look()]), flush=True); os._exit(0)"
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "DS_ACCELERATOR")}
    done = subprocess.run(
        [sys.executable, "-c", LOOK + code + report, *arguments],
        env=environment | {"PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("CHANGES ")]
    assert lines, done.stderr
    before, after = json.loads(lines[0].removeprefix("CHANGES "))
    return {name: [before[name], after[name]] for name in before if before[name] != after[name]}


def test_importing_every_module_leaves_the_process_as_it_was():
    assert changes(IMPORT_ALL) == {}


@pytest.fixture
def job(tmp_path, make_tiny_config) -> str:
    data = write_markov(tmp_path / "markov", tokens=3000, documents=40)
    own = {"run.dir": str(tmp_path), "data.train": data, "data.val": data}
    path = tmp_path / "run.yaml"
    path.write_text(make_tiny_config(own | {"train.dtype": "float32"}).to_yaml())
    return str(path)


@pytest.mark.dist
def test_a_trainer_in_a_notebook_leaves_the_process_as_it_was(job):
    assert changes(BUILD, job) == {}


@pytest.mark.dist
def test_the_command_line_changes_its_own_process_and_the_test_sees_it(job):
    assert {"signals", "filters"} <= changes(OWN, job).keys()
