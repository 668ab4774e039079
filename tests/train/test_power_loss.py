"""When the power fails at any point of a save, what is left is the old state or the new one."""

import os
from pathlib import Path

import pytest
import torch

from dsv3_mtp.files.atomic import write_json
from dsv3_mtp.files.fragments import Fragment, Fragments, write_fragments
from dsv3_mtp.files.run_folder import newest_sound, read_reached
from dsv3_mtp.hf import export_hf
from dsv3_mtp.hf.load import open_checkpoint
from dsv3_mtp.report.metrics import MetricsLog, read_metrics
from dsv3_mtp.runs.verify import verify
from dsv3_mtp.train import checkpoint
from tests.made_runs import write_text_run
from tests.power import failing


def save(run: Path, step: int) -> None:
    """What `checkpoint.save` does on one rank, without an engine."""
    folder = run / "checkpoints" / f"global_step{step}"
    checkpoint._begin(folder)
    values = torch.full((6,), float(step))
    part = write_fragments(folder, 0, [Fragment("w", (2, 3), 0, values, {}, {})])
    state = {"step": step, "tokens": 64 * step}
    checkpoint._commit(folder, [part], state, {"step": step, "counters": {}}, keep=1)


def test_a_checkpoint_is_the_old_one_or_the_new_one(tmp_path):
    run = tmp_path / "disk/runs/one"
    log = MetricsLog(run / "metrics.jsonl")
    reached = []

    def resumes(left: Path) -> None:
        newest, _ = newest_sound(left / "runs/one/checkpoints")
        step = 0
        if newest is not None:
            step = read_reached(newest)["step"]
            assert Fragments(newest).read("w").tolist() == [float(step)] * 6
            written = [line["step"] for line in read_metrics(left / "runs/one/metrics.jsonl")]
            assert written[:step] == list(range(1, step + 1))  # no line behind the checkpoint
        reached.append(step)

    with failing(tmp_path / "disk", resumes, tmp_path):
        for step in (1, 2, 3):
            log.append({"step": step})
            log.sync()
            save(run, step)
    assert reached == sorted(reached) and set(reached) == {0, 1, 2, 3}


def test_a_json_file_is_the_old_one_or_the_new_one(tmp_path):
    path = tmp_path / "disk" / "results.json"
    path.parent.mkdir()
    write_json(path, {"n": 0})
    seen = []
    with failing(path.parent, lambda left: seen.append((left / path.name).read_text()), tmp_path):
        for n in (1, 2):
            write_json(path, {"n": n})
    assert set(seen) == {f'{{\n "n": {n}\n}}\n' for n in (0, 1, 2)} and seen == sorted(seen)


def test_an_export_is_whole_or_absent(make_tiny_config, tmp_path):
    config = make_tiny_config({"model.vocab_size": 260, "train.dtype": "float32"})
    run, _ = write_text_run(config, tmp_path)
    (tmp_path / "disk").mkdir()
    found = []

    def whole(left: Path) -> None:
        found.append((left / "hf").exists())
        if found[-1]:
            open_checkpoint(left / "hf")
            assert verify(left / "hf") == [] and (left / "hf/tokenizer.json").stat().st_size > 1000

    with failing(tmp_path / "disk", whole, tmp_path):
        export_hf(run, tmp_path / "disk/hf", shard_bytes=60_000)
    assert not found[0] and found[-1]


def test_what_was_not_synced_is_lost_here(tmp_path):
    """The shim itself: without fsync a replaced file is old or empty."""
    root = tmp_path / "disk"
    root.mkdir()
    (root / "a").write_text("old")
    left = []

    def look(folder: Path) -> None:
        left.append({path.name: path.read_text() for path in folder.iterdir()})

    with pytest.raises(AssertionError), failing(root, look, tmp_path):
        (root / "b").write_text("new")
        os.replace(root / "b", root / "a")
    assert {"a": "old"} in left and {"a": ""} in left
