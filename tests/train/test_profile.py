"""The trace of a few steps: its named ranges, and what is refused."""

import gzip
import json

import pytest
import torch

from dsv3_mtp.ops import ranges
from dsv3_mtp.ops.ranges import named
from dsv3_mtp.train.process import own_process
from dsv3_mtp.train.profile import parse_steps
from tests.conftest import tiny
from tests.ranks import run_ranks, write_markov


def test_steps_are_those_named_both_ends_included():
    assert list(parse_steps("steps=10:13")) == [10, 11, 12, 13]


@pytest.mark.parametrize("text", ["10:13", "steps=10", "steps=a:b", "steps=0:3", "steps=5:4", ""])
def test_what_names_no_steps_is_refused_with_the_right_form(text):
    with pytest.raises(ValueError, match=r"--profile .*(FIRST:LAST|FIRST <= LAST)"):
        parse_steps(text)


def test_a_range_is_the_plain_function_until_a_profiler_runs(monkeypatch):
    double = named("double")(lambda x: 2 * x)
    with torch.profiler.profile() as trace:
        assert double(2) == 4
        monkeypatch.setattr(ranges, "recording", True)
        assert double(3) == 6
    assert [e.key for e in trace.key_averages()].count("double") == 1
    assert next(e.count for e in trace.key_averages() if e.key == "double") == 1


def profiled(config) -> None:
    own_process(config, command=["test"], profile=range(2, 4)).run()


@pytest.mark.dist
def test_a_run_writes_a_trace_of_the_steps_asked_for_with_named_ranges(tmp_path):
    data = write_markov(tmp_path / "markov", tokens=3000, documents=20)
    more = {"data.train": data, "data.val": data, "run.dir": str(tmp_path), "eval.every": 0}
    config = tiny(more | {"train.total_tokens": 5 * 4 * 16, "train.micro_batch_size": 2})
    assert run_ranks(profiled, config, log=tmp_path / "log") == [0]
    with gzip.open(tmp_path / "tiny" / "trace.rank0.json.gz", "rt") as file:
        names = [event.get("name") for event in json.load(file)["traceEvents"]]
    for name, times in {"data": 2, "forward": 4, "backward": 4, "optimizer": 2}.items():
        assert names.count(name) == times, name
    assert names.count("heads") == names.count("loss") == 4
    assert {name for name in names if name and name.startswith("step ")} >= {"step 2", "step 3"}
    assert "step 1" not in names and "step 4" not in names
