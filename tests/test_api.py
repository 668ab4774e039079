"""The Python API: a run trained, loaded, read and used, in a process that stays as it was."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dsv3_mtp
from dsv3_mtp import Config, ConfigError, load_config
from dsv3_mtp.report.metrics import read_metrics
from tests.conftest import tiny
from tests.made_runs import write_text_run
from tests.ranks import run_ranks, write_markov

ROOT = Path(__file__).parents[1]


def test_every_public_name_is_there_for_completion_and_for_type_checkers():
    tree = ast.parse((ROOT / "dsv3_mtp/__init__.py").read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    typed = {
        (alias.name, node.module)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert typed == {(name, f"dsv3_mtp.{home}") for name, home in dsv3_mtp._HOMES.items()}
    assert set(dsv3_mtp.__all__) <= set(dir(dsv3_mtp))
    for name in dsv3_mtp.__all__:
        assert getattr(dsv3_mtp, name).__doc__, name
        assert not (ROOT / "dsv3_mtp" / name).exists(), f"{name} is a folder too, which would win"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("mtp.loss_weight", 0.1),
        ("mtp.loss_weight", {"type": "cosine", "start": 0.3, "end": 0.0}),
        ("mtp.mode", "parallel"),  # and no option of the sequential kind is left
        ("mtp.objective", {"kl": 1.0}),  # which replaces {ce: 1}
        ("run.name", "1e-3"),  # text, though YAML would read a number
    ],
)
def test_replace_is_a_config_with_one_other_key(tmp_path, key, value):
    config = tiny()
    changed = config.replace(key, value)
    path = tmp_path / "config.yaml"
    path.write_text(config.to_yaml())
    assert changed == load_config(path, [f"{key}={json.dumps(value)}"])
    assert changed != config and config == tiny()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("mtp.lambda", 1, "mtp.lambda: unknown key"),
        ("train.batch_size", 0, "train.batch_size: must be >= 1 (got 0)"),
        ("run.name.first", 1, "not a mapping; set run.name as a whole"),
    ],
)
def test_replace_says_what_is_wrong(key, value, message):
    with pytest.raises(ConfigError) as error:
        tiny().replace(key, value)
    assert message in str(error.value)


def make_run(root: Path) -> Config:
    data = write_markov(root / "markov", tokens=3000, documents=40)
    own = {"run.dir": str(root / "runs"), "data.train": data, "data.val": data}
    return tiny(own | {"train.dtype": "float32", "train.total_tokens": 512, "eval.every": 4})


def _train_twice(config: Config) -> None:
    state, threads = torch.random.get_rng_state(), torch.get_num_threads()
    run = dsv3_mtp.train_run(config)
    longer = dsv3_mtp.train_run(config.replace("train.total_tokens", 768))  # the same folder
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.get_num_threads() == threads
    records, table = read_metrics(run.folder / "metrics.jsonl"), longer.metrics
    assert table.to_pylist() == [dict.fromkeys(table.column_names) | r for r in records]
    assert table["step"].to_pylist()[-1] == 12
    with pytest.warns(UserWarning, match="table drafters|floor|trigram"):
        result = longer.evaluate(prompts=2)
    last = records[-1]
    assert result["val/main_loss"] == pytest.approx(last["val/main_loss"], rel=1e-5)
    assert {"val/overlap/1", "val/acceptance/1", "val/floor/trigram"} <= set(result)
    with pytest.raises(ValueError, match=r"no tokenizer\.json"):
        longer.generate("x")


@pytest.mark.dist
def test_a_run_is_trained_longer_read_and_evaluated_in_one_process(tmp_path):
    log = tmp_path / "log"
    code = run_ranks(_train_twice, make_run(tmp_path), log=log)
    assert code == [0], Path(f"{log}.rank0").read_text()


@pytest.fixture(scope="module")
def text_run(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("text")
    own = {"model.vocab_size": 300, "model.max_position_embeddings": 32, "run.dir": "runs"}
    own |= {"train.dtype": "float32"}
    folder, _ = write_text_run(
        tiny(own | {"data.train": "data/tiny", "data.val": "data/tiny"}), root
    )
    return folder


def test_text_goes_in_and_comes_out_and_drafts_do_not_change_it(text_run, monkeypatch):
    monkeypatch.chdir(text_run.parents[1])
    run = dsv3_mtp.load_run(text_run)
    plain = run.generate("plain", max_new_tokens=8)
    assert plain and plain == run.generate("plain", max_new_tokens=8, speculative=True)
    sampled = {
        run.generate("a", max_new_tokens=8, temperature=1.0, seed=seed) for seed in (1, 1, 2)
    }
    assert len(sampled) == 2
    with pytest.raises(ValueError, match="draft_depth goes with speculative=True"):
        run.generate("a", draft_depth=2)


def test_a_checkpoint_in_deepseeks_layout_speaks_as_its_run_does(text_run, tmp_path, monkeypatch):
    from dsv3_mtp.hf import export_hf

    monkeypatch.chdir(text_run.parents[1])
    export_hf(str(text_run), str(tmp_path / "hf"), dtype="fp32")
    other = dsv3_mtp.load_hf(tmp_path / "hf")
    assert other.model.depths == 1
    ours = dsv3_mtp.load_run(text_run)
    text = {model.generate("plain", max_new_tokens=8, speculative=True) for model in (ours, other)}
    assert len(text) == 1


def test_what_is_no_run_is_said(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere: no config\.yaml there"):
        dsv3_mtp.load_run(tmp_path / "nowhere")


@pytest.mark.slow
def test_the_notebook_runs(tmp_path):
    """Its code cells, one after the other, in a folder that has the clone's configs."""
    cells = json.loads((ROOT / "examples/notebook.ipynb").read_text())["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] for cell in cells if cell["cell_type"] == "code")
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "MPLBACKEND": "Agg"}
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(code)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "val/floor/trigram" in done.stdout
