"""The package changes nothing of the process that imports it or builds a Trainer: what it does to a
process of its own stands in train/process.py.
"""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import tiny
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
from dsv3_mtp.train.process import own_process
own_process(load_config(sys.argv[1]).replace("run.name", "own"), command=[]).optimizer_step()
"""
TELL = "\nprint('LOOK', json.dumps(look()), flush=True)\n"


@pytest.fixture(scope="module")
def changes(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What each of the three changes, one after the other in one process that has loaded what the
    package uses: name -> [before, after].
    """
    folder = tmp_path_factory.mktemp("process")
    data = write_markov(folder / "markov", tokens=3000, documents=40)
    own = {"run.dir": str(folder), "data.train": data, "data.val": data}
    path = folder / "run.yaml"
    path.write_text(tiny(own | {"train.dtype": "float32"}).to_yaml())
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "DS_ACCELERATOR")}
    code = TELL.join([LOOK, IMPORT_ALL, BUILD, OWN, "os._exit(0)"])
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)],
        env=environment | {"PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("LOOK ")]
    assert len(lines) == 4, done.stderr
    looks = [json.loads(line.removeprefix("LOOK ")) for line in lines]
    return [
        {name: [before[name], after[name]] for name in before if before[name] != after[name]}
        for before, after in itertools.pairwise(looks)
    ]


def test_importing_every_module_leaves_the_process_as_it_was(changes):
    assert changes[0] == {}


@pytest.mark.dist
def test_a_trainer_in_a_notebook_leaves_the_process_as_it_was(changes):
    assert changes[1] == {}


@pytest.mark.dist
def test_the_command_line_changes_its_own_process_and_the_test_sees_it(changes):
    assert {"signals", "filters"} <= changes[2].keys()
