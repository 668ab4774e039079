"""The draft vocabulary of a run: the most frequent tokens of the text that it is trained on."""

import json

import numpy as np
import pytest

from dsv3_mtp.data.source import open_source
from dsv3_mtp.runs import frequencies
from dsv3_mtp.runs.frequencies import FILE, most_frequent
from tests.conftest import tiny
from tests.ranks import write_markov


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A folder and a config with two sources of text."""
    monkeypatch.setattr(frequencies, "BLOCK", 700)  # several to a source
    paths = [
        write_markov(tmp_path / name, tokens=size, documents=9, states=states)
        for name, size, states in (("a", 2000, 64), ("b", 500, 16))
    ]
    data = [{"path": path, "weight": w} for path, w in zip(paths, (3.0, 1.0), strict=True)]
    return tmp_path, tiny({"data.train": data, "data.val": paths[0]}), paths


def test_the_most_frequent_tokens_by_the_sources_shares_counted_once_and_read_again(run):
    folder, config, paths = run
    share = np.zeros(64)
    for path, weight in zip(paths, (0.75, 0.25), strict=True):
        source = open_source(path, "train")
        tokens = source.read(0, source.tokens)
        share += weight * np.bincount(tokens, minlength=64) / len(tokens)
    for size in (1, 5, 20, 64):
        want = sorted(sorted(range(64), key=lambda token: -share[token])[:size])
        assert most_frequent(folder, config, size) == tuple(want)
    for path in paths:  # the data may be gone by now
        (folder / f"{path}.bin").unlink()
    assert len(most_frequent(folder, config, 7)) == 7


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c | {"sources": []}, "at least 1 item"),
        (lambda c: c["sources"][0]["counts"].pop() and c, "not of a vocabulary of 64 tokens"),
        (lambda c: c["sources"][0]["counts"].__setitem__(3, -1) or c, "greater than or equal to 0"),
        (lambda c: c | {"format": 99}, "written by a newer dsv3_mtp"),
        (lambda c: c["sources"][0].update(manifest_hash="x") or c, "counted from other data"),
    ],
)
def test_counts_that_are_not_the_run_s_are_refused_in_one_sentence(run, change, message):
    folder, config, _ = run
    most_frequent(folder, config, 4)
    content = json.loads((folder / FILE).read_text())
    used = {
        str(n): {"path": "x", "manifest_hash": source["manifest_hash"]}
        for n, source in enumerate(content["sources"])
    }
    start = {"time": "", "git": None, "git_dirty": False, "python": "", "versions": {}}
    start |= {"device": "cpu", "threads": 1, "data": used}
    (folder / "manifest.json").write_text(json.dumps({"starts": [start]}))
    assert len(most_frequent(folder, config, 4)) == 4
    (folder / FILE).write_text(json.dumps(change(content)))
    with pytest.raises(ValueError, match=message) as error:
        most_frequent(folder, config, 4)
    assert "\n" not in str(error.value)


def test_a_size_outside_the_vocabulary_and_a_task_are_refused(run):
    folder, config, _ = run
    with pytest.raises(ValueError, match=r"model.vocab_size = 64 tokens \(got 65\)"):
        most_frequent(folder, config, 65)
    task = tiny({"data.task": {"type": "suffix_sum"}, "data.train": None, "data.val": None})
    with pytest.raises(ValueError, match=r"data.task suffix_sum: a task has no text"):
        most_frequent(folder, task, 4)
