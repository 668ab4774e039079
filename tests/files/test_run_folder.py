"""A run folder becomes a model again, without DeepSpeed; what is wrong with the folder is said in a
sentence.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch

from dsv3_mtp.files.fragments import shard_name
from dsv3_mtp.files.run_folder import newest_checkpoint, run_config, tokenizer_of
from dsv3_mtp.hf import export_hf
from dsv3_mtp.model.causal_lm import DeepseekV3MTP
from dsv3_mtp.runs.model import load_model
from tests.conftest import contents
from tests.made_runs import write_checkpoint, write_text_run


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_loads_with_its_weights_biases_dtype_and_tokenizer(make_tiny_config, tmp_path, dtype):
    config = make_tiny_config({"train.dtype": dtype})
    folder, model = write_text_run(config, tmp_path)
    run = load_model(folder)
    expected = model.state_dict()
    assert run.config.model_copy(update={"data": config.data}) == config
    assert run.tokenizer == tmp_path / "data/tiny/tokenizer.json"
    assert not run.model.training
    assert {name: value.dtype for name, value in run.model.state_dict().items()} == {
        name: value.dtype for name, value in expected.items()
    }
    assert all(torch.equal(value, expected[name]) for name, value in run.model.state_dict().items())


@pytest.mark.parametrize("runs", [".", "runs", "runs/study"])
def test_the_tokenizer_is_found_from_another_folder_than_training_began_in(
    make_tiny_config, tmp_path, runs
):
    config = make_tiny_config({"run.dir": runs})
    write_text_run(config, tmp_path)
    run = tmp_path / runs / "tiny"
    if runs != "runs":  # where `write_text_run` puts it
        run.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(tmp_path / "runs/tiny", run)
    assert tokenizer_of(run_config(run), run) == tmp_path / "data/tiny/tokenizer.json"


def test_data_are_found_from_another_folder_than_training_began_in(
    make_tiny_config, tmp_path, monkeypatch
):
    config = make_tiny_config({"run.dir": "runs", "data.val": "data/pair"})
    folder = tmp_path / "runs/tiny"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(config.to_yaml())
    (tmp_path / "data/tiny").mkdir(parents=True)
    (tmp_path / "data/pair.idx").touch()
    found = run_config(folder).data
    assert (found.train, found.val) == (f"{tmp_path}/data/tiny", f"{tmp_path}/data/pair")
    monkeypatch.chdir(tmp_path)
    assert run_config(folder) == config


def test_a_checkpoint_of_many_ranks_loads_and_exports_as_one_of_one_rank(
    make_tiny_config, tmp_path
):
    folder, model = write_text_run(make_tiny_config({"model.vocab_size": 260}), tmp_path)
    export_hf(folder, tmp_path / "one")
    shutil.rmtree(folder / "checkpoints")
    write_checkpoint(folder, model, step=4, ranks=7)
    export_hf(folder, tmp_path / "seven")
    assert contents(tmp_path / "one") == contents(tmp_path / "seven")
    state = load_model(folder).model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_the_newest_complete_checkpoint_is_taken(make_tiny_config, tmp_path):
    folder, model = write_text_run(make_tiny_config(), tmp_path)
    write_checkpoint(folder, model, step=12)
    write_checkpoint(folder, model, step=100)
    with (folder / "checkpoints/global_step100" / shard_name(0)).open("ab") as file:
        file.write(b"x")  # not what COMPLETE.json says
    (folder / "checkpoints/global_step101").mkdir()
    assert newest_checkpoint(folder / "checkpoints") == folder / "checkpoints/global_step12"


def test_a_missing_run_or_checkpoint_is_named(make_tiny_config, tmp_path):
    with pytest.raises(ValueError, match=r"nowhere: no config\.yaml there"):
        load_model(tmp_path / "nowhere")
    folder, _ = write_text_run(make_tiny_config(), tmp_path)
    (folder / "checkpoints/global_step4/COMPLETE.json").write_text(
        json.dumps({"files": {"gone": 1}})
    )
    with pytest.raises(ValueError, match="no complete checkpoint there"):
        load_model(folder)


def test_weights_of_another_model_are_refused(make_tiny_config, tmp_path):
    folder, _ = write_text_run(make_tiny_config(), tmp_path)
    other = make_tiny_config({"mtp.mode": "none"})
    write_checkpoint(folder, DeepseekV3MTP(other.model, other.mtp), step=9)
    with pytest.raises(ValueError, match=r"do not fit .*config.yaml"):
        load_model(folder)


def test_data_without_a_tokenizer_gives_none(make_tiny_config, tmp_path):
    folder, _ = write_text_run(make_tiny_config(), tmp_path)
    (tmp_path / "data/tiny/tokenizer.json").unlink()
    assert load_model(Path(folder)).tokenizer is None
