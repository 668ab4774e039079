"""A checkpoint of a newer format is refused in one sentence, and never taken for a damaged one."""

import json

import pytest

from dsv3_mtp.files.format import FORMAT, check_format
from dsv3_mtp.files.run_folder import COMPLETE, is_complete, newest_checkpoint
from dsv3_mtp.train.checkpoint import read_state


def checkpoint(folder, version):
    made = folder / "global_step3"
    made.mkdir(parents=True)
    state = {"format": version, "step": 3, "tokens": 30, "config": {}, "layout": "1 rank"}
    state |= {"sampler": {"samples": 3, "counts": [3]}, "clock": {"seconds": 1.0}}
    (made / "state.json").write_text(json.dumps(state))
    size = (made / "state.json").stat().st_size
    complete = {"format": version, "step": 3, "files": {"state.json": size}}
    (made / COMPLETE).write_text(json.dumps(complete))
    return made


def test_this_format_is_read(tmp_path):
    made = checkpoint(tmp_path, FORMAT)
    assert newest_checkpoint(tmp_path) == made and read_state(made)["step"] == 3
    check_format({}, made)  # written before files named their format


def test_a_newer_format_is_refused_with_the_remedy_and_is_not_called_incomplete(tmp_path):
    made = checkpoint(tmp_path, FORMAT + 1)
    for read in (is_complete, read_state, lambda _: newest_checkpoint(tmp_path)):
        with pytest.raises(ValueError, match=f"format {FORMAT + 1}, written by a newer dsv3_mtp"):
            read(made)
