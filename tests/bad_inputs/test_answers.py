"""Every wrong input is answered by a sentence: with the key or the file, the value and the bound,
exit code 2, nothing written, no traceback.
"""

import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

import dsv3_mtp.train.process  # noqa: F401  for the forked processes
from tests.bad_inputs import edges, folders, options, strangers, untrue
from tests.bad_inputs.ask import Case, faults
from tests.bad_inputs.world import ROOT, make_world

TABLES = (options.CASES, folders.CASES, strangers.CASES, edges.CASES, untrue.CASES)
CASES = {case.name: case for table in TABLES for case in table}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("bad") / "world")


def quarter(cases: Iterable[Case]) -> Iterator[Any]:
    """Every fourth case; the others, and those that take seconds, are marked slow."""
    for number, case in enumerate(cases):
        marks = [pytest.mark.slow] if number % 4 or case.slow else []
        yield pytest.param(case, id=case.name, marks=marks)


@pytest.mark.parametrize("case", [*quarter(CASES.values())])
def test_a_wrong_input_is_answered(world: Path, tmp_path: Path, case: Case):
    assert faults(case, world, tmp_path / "case") == []


def test_no_two_cases_have_one_name():
    assert len(CASES) == sum(map(len, TABLES))


# As a user starts it: what a fork of this process has in place already is built anew.
PROCESSES = [
    ("plan --config no.yaml", {}, "no.yaml: 1 problem"),
    ("plan --config c.yaml --set optim.lr=-1", {}, "must be > 0"),
    ("plan --config c.yaml", {"RANK": "x"}, "RANK='x': must be a whole number"),
    ("plan --config c.yaml", {"WORLD_SIZE": "x"}, "WORLD_SIZE='x'"),
    ("train --config c.yaml --set run.name=p", {"RANK": "0"}, "WORLD_SIZE, LOCAL_RANK"),
    ("train --config c.yaml --set run.name=p", {"WORLD_SIZE": "2"}, "WORLD_SIZE is set, RANK"),
    ("train --config c.yaml --set run.name=p", {"LOCAL_RANK": "-1"}, "LOCAL_RANK='-1'"),
    ("train --config c.yaml --set run.name=p --set data.train=nowhere", {}, "nowhere: neither"),
    ("train --config c.yaml --set run.dir=words.txt", {}, "run.dir, run.name: 'words.txt"),
    ("train --config c.yaml --set checkpoint.resume=never", {}, "checkpoint.resume: never"),
    ("train --config c.yaml --set model.hidden_size=64", {}, "hidden_size"),
    ("study --study c.yaml --dry-run", {}, "c.yaml: "),
    ("generate --run no --prompt x", {}, "no config.yaml"),
    ("generate --run runs/tiny --prompt x --top-p 0", {}, "top_p"),
    ("generate --run runs/tiny --prompt x --device meta", {}, "--device meta"),
    ("evaluate --run runs/tiny --data no", {}, "no: neither"),
    ("prepare --out new --input no.txt --vocab-size 300", {}, "no.txt"),
    ("export --run runs/tiny --out x --dtype fp8 --for vllm", {}, "vLLM"),
    ("import --from runs/tiny --out x", {}, "config.json"),
    ("verify words.txt", {}, "words.txt: no run"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("command", "env", "said"), PROCESSES)
def test_a_process_of_its_own_answers_so_too(world: Path, command: str, env: dict, said: str):
    arguments = [sys.executable, "-m", "dsv3_mtp", *command.split()]
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | env
    done = subprocess.run(arguments, cwd=world, env=environment, capture_output=True, text=True)
    assert (done.returncode, "Traceback" in done.stderr) == (2, False) and said in done.stderr
