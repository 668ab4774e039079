"""Heads of a file outside the package, from the command line to the export, and whom one trusts."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

from dsv3_mtp.config import ConfigError, code, load_config
from dsv3_mtp.runs.model import load_model
from dsv3_mtp.runs.verify import verify
from dsv3_mtp.study.plan import freeze, load_archive
from tests.heads_under_test import OTHERS
from tests.made_runs import read_newest
from tests.ranks import rows, run_tool, write_markov
from tests.study.toy import load_toy

ROOT = Path(__file__).parents[2]
BAG = "examples.bag_head:BagHead"
SIZES = {
    "model.vocab_size": 64,
    "mtp.num_nextn_predict_layers": 3,
    "data.build": "null",
    "data.seq_len": 32,
    "train.total_tokens": 4 * 8 * 32,
    "train.batch_size": 8,
    "train.micro_batch_size": 4,
    "train.threads": 1,
    "checkpoint.every": 2,
    "checkpoint.keep": 2,
    "eval.every": 0,
    "eval.batches": 2,
    "log.every": 1,
    "log.tensorboard": "false",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    return write_markov(tmp_path_factory.mktemp("data") / "markov", tokens=6000, documents=40)


def run(folder: Path, data: str, tool: str, *arguments: str, ranks: int = 1) -> tuple[int, str]:
    """A command started in the clone, as a user's. Exit code and all that it says."""
    log = folder / "log"
    for old in folder.glob("log.*"):
        old.unlink()
    return run_tool(ROOT / "tools" / f"{tool}.py", *arguments, log=log, world_size=ranks, cwd=ROOT)


def sets(folder: Path, data: str, mode: str, name: str) -> list[str]:
    keys = SIZES | {"run.dir": folder, "run.name": name, "data.train": data, "data.val": data}
    return [f"--set={key}={value}" for key, value in (keys | {"mtp.mode": mode}).items()]


def train(folder: Path, data: str, mode: str, name: str, *more: str) -> tuple[int, str]:
    config = str(ROOT / "configs" / "v3_nano.yaml")
    return run(folder, data, "train", "--config", config, *sets(folder, data, mode, name), *more)


@pytest.mark.parametrize("mode", rows(OTHERS, [BAG]), ids=lambda mode: mode.rpartition(":")[2])
def test_a_head_of_a_file_trains_resumes_bitwise_and_is_read_only_with_trust(tmp_path, data, mode):
    code_, text = train(tmp_path, data, mode, "whole")
    assert code_ == 0, text
    whole = read_newest(tmp_path / "whole")
    # stopped after two of four steps: the later checkpoint was never written
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut/checkpoints/global_step4")
    (tmp_path / "cut/checkpoints/latest").write_text("global_step2")
    code_, text = train(tmp_path, data, mode, "cut")
    assert code_ == 0 and "resumed at step 2" in text, text
    resumed = read_newest(tmp_path / "cut")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)

    folder = str(tmp_path / "whole")
    for tool, more in {
        "evaluate": ["--prompts", "2", "--batches", "1", "--new-tokens", "6"],
        "generate": ["--prompt-ids", "1 2 3", "--max-new-tokens", "6"],
        "export_hf": ["--out", str(tmp_path / "hf"), "--trunk-only"],
    }.items():
        code_, text = run(tmp_path, data, tool, "--run", folder, *more)
        assert code_ == 2 and f"names code outside the package, {mode}" in text, text
        assert "Traceback" not in text and not (tmp_path / "hf").exists()
        code_, text = run(tmp_path, data, tool, "--run", folder, "--trust-code", *more)
        assert code_ == 0, text
    drafting = ["--prompt-ids", "1 2 3", "--max-new-tokens", "8", "--speculative", "--trust-code"]
    code_, text = run(tmp_path, data, "generate", "--run", folder, *drafting)
    refused = "has no drafter" in text and code_ == 2 and "Traceback" not in text
    assert refused or (code_ == 0 and ("same tokens" in text or "near-tie" in text)), text
    code_, text = run(
        tmp_path, data, "export_hf", "--run", folder, "--trust-code", "--out", str(tmp_path / "h2")
    )
    if mode == BAG:
        assert code_ == 2 and "no place for a bag of tokens" in text and text.count("\n") <= 2


def test_the_source_is_hashed_and_a_changed_one_is_named_at_resume(tmp_path, data, monkeypatch):
    mine = tmp_path / "mine"
    mine.mkdir()
    source = (ROOT / "examples/bag_head.py").read_text()
    (mine / "own_head.py").write_text(source)
    monkeypatch.syspath_prepend(str(mine))
    train(tmp_path, data, "own_head:BagHead", "run")
    start = json.loads((tmp_path / "run/manifest.json").read_text())["starts"][-1]
    assert list(start["code"]) == ["own_head:BagHead"] and len(start["code"].popitem()[1]) == 64
    (mine / "own_head.py").write_text(source + "\n# changed\n")
    _, text = train(tmp_path, data, "own_head:BagHead", "run", "--set=train.total_tokens=1536")
    assert "changed since the last start: the source of own_head:BagHead" in text


def test_code_is_found_from_the_working_directory_late_and_last(tmp_path, monkeypatch):
    (tmp_path / "late_head.py").write_text("from examples.bag_head import BagHead\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p != str(tmp_path)])
    assert code.find("late_head:BagHead").__name__ == "BagHead"
    assert sys.path[-1] == str(tmp_path)


@pytest.mark.parametrize(
    ("mode", "said"),
    [
        ("no_such.module:Head", "mtp.mode: no_such.module cannot be imported"),
        ("examples.bag_head:Nothing", "has no Nothing"),
        ("examples.bag_head:BagDrafter", "is no subclass of dsv3_mtp.heads.base.Head"),
    ],
)
def test_what_is_no_head_is_said_in_one_line(mode, said):
    with pytest.raises(ConfigError, match=said) as error:
        load_config(ROOT / "configs/v3_nano.yaml", [f"mtp.mode={mode}"])
    assert len(error.value.problems) == 1


def test_a_strangers_folder_imports_nothing(tmp_path):
    (tmp_path / "evil_head.py").write_text("raise SystemExit('imported')\n")
    text = load_config(ROOT / "configs/v3_nano.yaml").to_yaml()
    text = text.replace("mode: sequential", "mode: evil_head:Head")
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ConfigError, match="names code outside the package, evil_head:Head"):
        load_model(tmp_path)
    assert verify(tmp_path) == []  # whole, and not imported


def test_a_strangers_archive_imports_nothing(tmp_path):
    loaded = load_toy(tmp_path)
    folder = loaded.study.folder
    folder.mkdir(parents=True)
    freeze(loaded, 0)
    plan = json.loads((folder / "plan.json").read_text())
    for config in plan["current"]["configs"].values():
        config["mtp"]["mode"] = "evil_head:Head"
    (folder / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(ConfigError, match="names code outside the package, evil_head:Head"):
        load_archive(folder)
