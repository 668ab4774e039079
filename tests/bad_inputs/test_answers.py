"""Every wrong input is answered by a sentence: with the key or the file, the value and the bound,
exit code 2, nothing written, no traceback.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

import dsv3_mtp.train.process  # noqa: F401  for the forked processes
from tests.bad_inputs import folders, options, strangers
from tests.bad_inputs.ask import Case, faults
from tests.bad_inputs.world import make_world

CASES = {case.name: case for case in (*options.CASES, *folders.CASES, *strangers.CASES)}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("bad") / "world")


def half(cases: Iterable[Case]) -> Iterator[Any]:
    """Every second case; the others, and those that take seconds, are marked slow."""
    for number, case in enumerate(cases):
        marks = [pytest.mark.slow] if number % 2 or case.slow else []
        yield pytest.param(case, id=case.name, marks=marks)


@pytest.mark.parametrize("case", half(CASES.values()))
def test_a_wrong_input_is_answered(world: Path, tmp_path: Path, case: Case):
    assert faults(case, world, tmp_path / "case") == []


def test_no_two_cases_have_one_name():
    assert len(CASES) == sum(map(len, (options.CASES, folders.CASES, strangers.CASES)))
