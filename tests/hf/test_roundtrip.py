"""Export and import: the same bytes again, the same model again, whatever the type and the number
of shards.
"""

import json

import pytest
import torch

from dsv3_mtp.files.atomic import lock
from dsv3_mtp.hf import export_hf, import_hf, load_hf
from dsv3_mtp.hf.export import new_folder
from dsv3_mtp.hf.files import Checkpoint
from dsv3_mtp.hf.keys import slots
from dsv3_mtp.precision.quantise import BLOCK, dequantise
from dsv3_mtp.runs.model import load_model
from tests.conftest import contents

WIDE = {
    "model__hidden_size": 144,
    "model__moe_intermediate_size": 136,
}  # neither a multiple of the 128 of a block


@pytest.mark.parametrize("dtype", ["bf16", "fp8", "fp32"])
@pytest.mark.parametrize("depths", [0, 1, 2])
def test_export_import_export_is_byte_identical(make_run, tmp_path, dtype, depths):
    mode = {"mtp__mode": "none"} if not depths else {"mtp__num_nextn_predict_layers": depths}
    run, _ = make_run(**mode, **WIDE)
    export_hf(run, tmp_path / "first", dtype=dtype, shard_bytes=200_000)
    import_hf(tmp_path / "first", tmp_path / "imported", shard_bytes=77_000)
    export_hf(tmp_path / "imported", tmp_path / "second", dtype=dtype, shard_bytes=200_000)
    first, second = contents(tmp_path / "first"), contents(tmp_path / "second")
    assert first.pop("README.md") != second.pop("README.md")  # the second was not trained here
    assert len([name for name in first if name.endswith(".safetensors")]) > 2
    assert first == second


def test_safetensors_own_library_reads_every_tensor(make_run, tmp_path):
    safetensors = pytest.importorskip("safetensors")
    run, model = make_run()
    export_hf(run, tmp_path / "hf", shard_bytes=50_000)
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    state, total = model.state_dict(), 0
    for slot in slots(model.config, 1):
        with safetensors.safe_open(
            tmp_path / "hf" / index["weight_map"].pop(slot.name), framework="pt"
        ) as file:
            assert file.metadata() == {"format": "pt"}
            tensor = file.get_tensor(slot.name)
        total += tensor.numel() * tensor.itemsize
        expected = state[slot.key][slot.index]
        assert torch.equal(tensor, expected if slot.is_float32 else expected.bfloat16()), slot.name
    assert index["weight_map"] == {} and index["metadata"]["total_size"] == total


def test_a_float32_export_is_the_model_bit_for_bit(make_run, tmp_path):
    run, model = make_run(mtp__num_nextn_predict_layers=2)
    export_hf(run, tmp_path / "hf", dtype="fp32")
    loaded, tokenizer = load_hf(tmp_path / "hf")
    assert (loaded.config, loaded.mtp_config.mode, loaded.depths, tokenizer) == (
        model.config,
        "sequential",
        2,
        None,
    )
    assert_same(loaded.state_dict(), model.state_dict())
    again, run_config, *_ = load_model(run)
    assert run_config.model == loaded.config
    assert_same(again.state_dict(), model.state_dict())


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def test_fp8_is_exact_on_the_block_grid_and_leaves_the_rest_alone(make_run, tmp_path):
    run, model = make_run(**WIDE)
    export_hf(run, tmp_path / "hf", dtype="fp8")
    settings = json.loads((tmp_path / "hf" / "config.json").read_text())["quantization_config"]
    expected = {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    }
    assert settings == expected
    import_hf(tmp_path / "hf", tmp_path / "imported")
    loaded, *_ = load_model(tmp_path / "imported")
    state, trained, stored = loaded.state_dict(), model.state_dict(), Checkpoint(tmp_path / "hf")
    for slot in slots(model.config, 1):
        got = state[slot.key][slot.index]
        assert got.dtype == (torch.float32 if slot.is_float32 else torch.bfloat16)
        if slot.quantised:
            assert stored.places[slot.name].dtype == "F8_E4M3"
            scale = stored.read(slot.name + "_scale_inv")
            assert torch.equal(got.float(), dequantise(stored.read(slot.name), scale, BLOCK)), (
                slot.name
            )
        else:
            assert torch.equal(got, trained[slot.key][slot.index].to(got.dtype)), slot.name
    names = {name for name in stored.places if name.endswith("_scale_inv")}
    assert names == {slot.name + "_scale_inv" for slot in slots(model.config, 1) if slot.quantised}


def test_foreign_fp8_scales_are_kept_exact_in_float32_and_their_rounding_is_reported(
    make_run, tmp_path
):
    run, _ = make_run()
    export_hf(run, tmp_path / "hf", dtype="fp8")
    file = next((tmp_path / "hf").glob("*.safetensors"))
    (tmp_path / "hf" / "model.safetensors.index.json").unlink()  # not what export wrote any more
    from safetensors.torch import load_file, save_file

    tensors = load_file(file)
    for name in tensors:
        if name.endswith("_scale_inv"):
            tensors[name] *= 1.1
    save_file(tensors, file, metadata={"format": "pt"})
    notes = import_hf(tmp_path / "hf", tmp_path / "rounded")
    assert any("bfloat16 rounds" in note for note in notes)
    notes = import_hf(tmp_path / "hf", tmp_path / "exact", dtype="fp32")
    assert not any("rounds" in note for note in notes)
    wide, config, *_ = load_model(tmp_path / "exact")
    assert config.train.dtype == "float32"
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(
        wide.state_dict()[name], dequantise(tensors[name], tensors[name + "_scale_inv"], BLOCK)
    )


def test_an_epsilon_that_readers_take_differently_is_reported(make_run, tmp_path):
    notes = export_hf(make_run(model__rms_norm_eps=1e-3)[0], tmp_path / "hf")
    notes += import_hf(tmp_path / "hf", tmp_path / "run")
    assert (
        sum("rms_norm_eps 0.001: the latents are normed with it here" in note for note in notes)
        == 2
    )
    again = export_hf(tmp_path / "run", tmp_path / "again")
    assert sum("rms_norm_eps" in note for note in again) == 1


def test_recycled_modules_are_one_module_on_disk(make_run, tmp_path):
    run, model = make_run(mtp__num_nextn_predict_layers=3, mtp__share_weights=True)
    notes = export_hf(run, tmp_path / "hf", dtype="fp32")
    assert any("recycles" in note for note in notes)
    loaded, _ = load_hf(tmp_path / "hf")
    assert loaded.depths == 1
    assert_same(loaded.state_dict(), model.state_dict())


@pytest.mark.parametrize("mode", ["parallel", "parallel_linear"])
def test_parallel_heads_export_as_a_plain_trunk_and_say_so(make_run, tmp_path, mode):
    run, model = make_run(mtp__mode=mode, mtp__num_nextn_predict_layers=2)
    notes = export_hf(run, tmp_path / "hf", dtype="fp32")
    assert any(f"not exported: the 2 {mode} MTP head(s)" in note for note in notes)
    loaded, _ = load_hf(tmp_path / "hf")
    assert loaded.depths == 0
    trunk = {
        name: value for name, value in model.state_dict().items() if not name.startswith("mtp.")
    }
    assert_same(loaded.state_dict(), trunk)


def test_loading_leaves_no_number_as_it_was(make_run, tmp_path):
    run, model = make_run(mtp__num_nextn_predict_layers=2)
    export_hf(run, tmp_path / "hf", dtype="fp32")
    from dsv3_mtp.hf import load_weights

    with torch.no_grad():
        for value in model.state_dict().values():
            value.fill_(float("nan"))
    load_weights(model, tmp_path / "hf")
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())


def test_aliases_may_be_missing_but_must_not_differ(make_run, tmp_path):
    from safetensors.torch import load_file, save_file

    run, _ = make_run()
    export_hf(run, tmp_path / "hf")
    file = next((tmp_path / "hf").glob("*.safetensors"))
    (tmp_path / "hf" / "model.safetensors.index.json").unlink()
    tensors = load_file(file)
    alias = tensors.pop("model.layers.3.shared_head.head.weight")
    save_file(tensors, file)
    import_hf(tmp_path / "hf", tmp_path / "without")
    save_file(tensors | {"model.layers.3.shared_head.head.weight": alias + 1}, file)
    with pytest.raises(ValueError, match=r"shared_head.head.weight: differs from lm_head.weight"):
        import_hf(tmp_path / "hf", tmp_path / "with")
    assert not (tmp_path / "with").exists()


def test_what_a_killed_export_left_is_deleted_by_the_next_and_two_at_once_are_refused(tmp_path):
    left = tmp_path / ".hf.partial"
    (left / "weights").mkdir(parents=True)
    (left / "model.safetensors").write_text("half")
    with new_folder(tmp_path / "hf") as folder:
        assert list(folder.iterdir()) == []
        (folder / "whole").touch()
        with (
            pytest.raises(ValueError, match="hf: another process is making it"),
            new_folder(tmp_path / "hf"),
        ):
            pass
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    assert [path.name for path in (tmp_path / "hf").iterdir()] == ["whole"]


def test_a_folder_that_another_process_finished_meanwhile_is_refused_before_the_work(
    tmp_path, monkeypatch
):
    def finished_first(path, busy):
        (tmp_path / "hf").mkdir()
        return lock(path, busy)

    monkeypatch.setattr("dsv3_mtp.hf.export.lock", finished_first)
    with pytest.raises(ValueError, match="hf exists already"), new_folder(tmp_path / "hf"):
        pytest.fail("nothing is to be made")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
