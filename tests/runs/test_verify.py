"""Damage that leaves every size as it was is named, wherever it is."""

import shutil

import pytest
import torch

from dsv3_mtp.config import load_config
from dsv3_mtp.files.fragments import INDEX, shard_name
from dsv3_mtp.files.run_folder import STATE
from dsv3_mtp.hf import export_hf, import_hf, load_hf
from dsv3_mtp.runs.model import load_model
from dsv3_mtp.runs.verify import verify
from tests.made_runs import complete, write_checkpoint, write_text_run


def flip(path, place=-100) -> None:
    """One bit of a byte of the data, or of text that stays JSON where it is a digit."""
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def digit(path) -> int:
    """Place of the last digit."""
    content = path.read_bytes()
    return max(n for n, byte in enumerate(content) if 48 <= byte <= 57)


@pytest.fixture
def run(make_tiny_config, tmp_path):
    folder, model = write_text_run(make_tiny_config({"model.vocab_size": 260}), tmp_path)
    write_checkpoint(folder, model, step=9, ranks=2)
    return folder


@pytest.mark.parametrize("name", [shard_name(0), shard_name(1), STATE, INDEX])
def test_a_flipped_bit_of_a_checkpoint_is_named_and_the_one_before_it_is_loaded(run, name):
    assert verify(run) == [] and load_model(run).notes == []
    path = run / "checkpoints/global_step9" / name
    flip(path, -100 if name.startswith("shard") else digit(path))
    [problem] = verify(run)
    assert problem.startswith(f"{path.parent}: {name}: is not what was written")
    assert verify(path.parent) == [problem]
    loaded = load_model(run)
    [note] = loaded.notes
    assert f"{path.parent}: {name}" in note and "not used" in note
    shutil.rmtree(path.parent)
    alone = load_model(run).model.state_dict()
    assert all(torch.equal(x, alone[key]) for key, x in loaded.model.state_dict().items())


def test_without_a_sound_checkpoint_nothing_is_loaded_or_exported(run, tmp_path):
    for step in (4, 9):
        flip(run / f"checkpoints/global_step{step}" / shard_name(0))
    for what in (load_model, lambda folder: export_hf(folder, tmp_path / "hf")):
        with pytest.raises(ValueError, match=r"no complete checkpoint there\n.*step9.*\n.*step4"):
            what(run)
    assert not (tmp_path / "hf").exists()


def test_numbers_that_are_not_finite_are_named(run):
    checkpoint = run / "checkpoints/global_step9"
    content = bytearray((checkpoint / shard_name(1)).read_bytes())
    content[-64:] = b"\xff" * 64  # float32 nan
    (checkpoint / shard_name(1)).write_bytes(content)
    complete(checkpoint)  # as if it had been written so
    with pytest.raises(
        ValueError, match=r"global_step9: 1 problem\(s\)\n.*: holds nan or infinity"
    ):
        load_model(run)


def test_a_flipped_bit_of_an_export_is_named_by_all_that_read_it(run, tmp_path):
    folder = tmp_path / "hf"
    export_hf(run, folder, shard_bytes=40_000)
    assert verify(folder) == []
    file = sorted(folder.glob("*.safetensors"))[1]
    flip(file)
    [problem] = verify(folder)
    assert problem.startswith(f"{folder}: {file.name}: is not what was written")
    for what in (load_hf, lambda where: import_hf(where, tmp_path / "again")):
        with pytest.raises(ValueError, match=f"damaged; make it again\n  {file.name}: is not"):
            what(folder)
    assert not (tmp_path / "again").exists()


def test_an_imported_run_is_verified_with_its_weights(run, tmp_path):
    export_hf(run, tmp_path / "hf")
    import_hf(tmp_path / "hf", tmp_path / "imported")
    load_config(tmp_path / "imported/config.yaml")
    assert verify(tmp_path / "imported") == []
    flip(next((tmp_path / "imported/weights").glob("*.safetensors")))
    assert len(verify(tmp_path / "imported")) == 1


def test_a_folder_that_is_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no run \(config.yaml\), checkpoint"):
        verify(tmp_path)
