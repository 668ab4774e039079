"""Everything that is refused: one report with every reason, exit code 2, nothing written."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dsv3_mtp.cli import command
from dsv3_mtp.hf import export_hf, import_hf
from tests.made_runs import write_checkpoint, write_state
from tests.ranks import run_tool

ROOT = Path(__file__).parents[2]


def left_behind(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- export ---------------------------------------------------------------------------------------

YARN = {
    "type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "mscale": 0.7,
    "mscale_all_dim": 0.0,
}
UNREPRESENTABLE = {
    "mtp__trunk_hidden=pre_norm": (
        {"mtp__trunk_hidden": "pre_norm"},
        "every reader of the layout feeds the trunk's",
    ),
    "mtp__chain=trunk": (
        {"mtp__chain": "trunk", "mtp__num_nextn_predict_layers": 2},
        "readers chain the modules'",
    ),
    "mtp__embed=false": ({"mtp__embed": False}, "eh_proj reads the token embedding"),
    "dense": ({"model__first_k_dense_replace": 3}, "all layers are dense"),
    "one expert": (
        {
            f"model__{key}": 1
            for key in ("n_routed_experts", "num_experts_per_tok", "n_group", "topk_group")
        },
        "n_routed_experts: 1: transformers scores",
    ),
    "no shared experts": ({"model__n_shared_experts": 0}, "no MoE layer without shared experts"),
    "yarn": (
        {"model__rope_scaling": YARN},
        "mscale 0.7 with mscale_all_dim 0.0 means different things",
    ),
}


@pytest.mark.parametrize("case", UNREPRESENTABLE)
def test_what_the_layout_cannot_say_is_refused_with_the_reason(make_run, tmp_path, case):
    overrides, reason = UNREPRESENTABLE[case]
    run, _ = make_run(**overrides)
    with pytest.raises(ValueError, match="cannot be written in DeepSeek-V3's layout") as error:
        export_hf(run, tmp_path / "hf")
    assert reason in str(error.value)
    assert left_behind(tmp_path) == ["runs"]
    if "--trunk-only" in str(error.value):
        notes = export_hf(run, tmp_path / "hf", trunk_only=True)
        assert any("not exported" in note for note in notes)


def test_all_reasons_come_at_once(make_run, tmp_path):
    run, _ = make_run(mtp__trunk_hidden="pre_norm", mtp__embed=False, model__n_shared_experts=0)
    with pytest.raises(ValueError) as error:
        export_hf(run, tmp_path / "hf")
    assert len(str(error.value).splitlines()) == 4


def test_one_depth_chained_to_the_trunk_is_the_ordinary_module(make_run, tmp_path):
    run, _ = make_run(mtp__chain="trunk")
    export_hf(run, tmp_path / "hf")


@pytest.mark.parametrize(
    ("overrides", "module"),
    [
        ({"mtp__loss_weight": 0.0}, 1),
        # the run is at 0.5
        ({"mtp__loss_weight": {"type": "linear", "start": 0.0, "end": 0.3, "begin": 0.6}}, 1),
        ({"mtp__curriculum": "forward"}, 3),
        ({"mtp__depth_weights": [1.0, 1.0, 0.0]}, 3),
    ],
)
def test_modules_that_no_loss_has_reached_are_refused(make_run, tmp_path, overrides, module):
    run, model = make_run(mtp__num_nextn_predict_layers=3, **overrides)
    with torch.no_grad():
        model.mtp.layers[2].shared_head.norm.weight.fill_(1.0)
    write_checkpoint(run, model, step=8)
    with pytest.raises(ValueError, match=f"MTP module {module} is as it was initialised"):
        export_hf(run, tmp_path / "hf")
    assert left_behind(tmp_path) == ["runs"]


def test_modules_that_an_earlier_start_trained_are_exported_though_their_loss_weight_is_0_now(
    make_run, tmp_path
):
    run, _ = make_run(mtp__num_nextn_predict_layers=2, mtp__loss_weight=0.0)
    export_hf(run, tmp_path / "hf")


def test_modules_that_training_began_with_are_exported_without_a_loss(make_run, tmp_path):
    run, _ = make_run()
    export_hf(run, tmp_path / "hf")
    further, _ = make_run("further", train__init_from=str(tmp_path / "hf"), mtp__loss_weight=0.0)
    export_hf(further, tmp_path / "again")


def test_a_module_that_learns_only_through_the_chain_is_exported(make_run, tmp_path):
    run, _ = make_run(mtp__num_nextn_predict_layers=2, mtp__depth_weights=[0.0, 1.0])
    export_hf(run, tmp_path / "hf")


def test_missing_unused_misshapen_and_not_finite_tensors_of_a_run(make_run, tmp_path):
    run, model = make_run()
    checkpoint = run / "checkpoints" / "global_step7"
    state = model.state_dict()
    broken = {name: value for name, value in state.items() if name != "mtp.layers.0.enorm.weight"}
    write_state(
        checkpoint,
        broken
        | {"extra": torch.zeros(1), "model.norm.weight": torch.zeros(3)}
        | {"model.layers.1.mlp.experts.down_proj": torch.zeros(8, 16, 32)},
    )
    with pytest.raises(ValueError) as error:
        export_hf(run, tmp_path / "hf")
    text = str(error.value)
    assert "4 problem(s)" in text and "mtp.layers.0.enorm.weight: missing" in text
    assert (
        "extra: not used by the model" in text
        and "model.norm.weight: has shape [3], config.yaml" in text
    )
    assert "experts.down_proj: has shape [8, 16, 32], config.yaml asks for [8, 32, 16]" in text

    state["lm_head.weight"][0, 0] = float("nan")
    state["model.layers.1.mlp.experts.down_proj"][5, 0, 0] = float("inf")
    write_state(checkpoint, state)
    for dtype in ("bf16", "fp8"):
        with pytest.raises(ValueError, match="hold nan or infinity") as error:
            export_hf(run, tmp_path / "hf", dtype=dtype)
        for name in (
            "lm_head.weight",
            "shared_head.head.weight",
            "model.layers.1.mlp.experts.5.down_proj.weight",
        ):
            assert name in str(error.value)
    assert left_behind(tmp_path) == ["runs"]


def test_an_unfinished_checkpoint_does_not_count(make_run, tmp_path):
    run, _ = make_run()
    (run / "checkpoints" / "global_step7" / "shard_rank0.safetensors").write_bytes(b"cut")
    with pytest.raises(ValueError, match="no complete checkpoint"):
        export_hf(run, tmp_path / "hf")


# --- import ---------------------------------------------------------------------------------------


@pytest.fixture
def exported(make_run, tmp_path):
    """(folder of an export, its single file's tensors, function that writes changed tensors)."""
    run, _ = make_run()
    folder = tmp_path / "hf"
    export_hf(run, folder)
    file = next(folder.glob("*.safetensors"))

    def write(tensors) -> None:
        (folder / "model.safetensors.index.json").unlink(missing_ok=True)
        save_file(tensors, file, metadata={"format": "pt"})

    return folder, load_file(file), write


def refused(folder: Path, **options) -> str:
    out = folder.parent / "imported"
    with pytest.raises(ValueError) as error:
        import_hf(folder, out, **options)
    assert left_behind(folder.parent) == ["hf", "runs"]
    return str(error.value)


def test_missing_unused_and_misshapen_tensors_are_listed_together(exported):
    folder, tensors, write = exported
    for expert in range(2, 7):
        del tensors[f"model.layers.1.mlp.experts.{expert}.up_proj.weight"]
    del tensors["model.layers.3.enorm.weight"]
    tensors["model.layers.0.self_attn.indexer.weight"] = torch.zeros(2)
    tensors["lm_head.weight"] = torch.zeros(63, 32)
    tensors["model.norm.weight"] = torch.zeros(32, dtype=torch.int64)
    write(tensors)
    text = refused(folder)
    assert text.splitlines()[0].endswith("5 problem(s)")
    assert "model.layers.1.mlp.experts.[2-6].up_proj.weight: missing" in text
    assert "model.layers.3.enorm.weight: missing" in text
    assert "model.layers.0.self_attn.indexer.weight: not used by this architecture" in text
    assert "lm_head.weight: has shape [63, 32], config.json asks for [64, 32]" in text
    assert "model.norm.weight: has type I64" in text


@pytest.mark.parametrize("keep", [0.9, 0.5, 0.001, 0.0])
def test_a_truncated_file_is_found_without_reading_the_data(exported, keep):
    folder, _, _ = exported
    file = next(folder.glob("*.safetensors"))
    os.truncate(file, int(file.stat().st_size * keep))
    assert "cut off" in refused(folder)


def test_a_missing_shard_an_index_that_lies_and_a_tensor_given_twice(make_run, tmp_path):
    run, _ = make_run()
    folder = tmp_path / "hf"
    export_hf(run, folder, shard_bytes=40_000)
    files = sorted(folder.glob("*.safetensors"))
    files[-1].unlink()
    first = load_file(files[0])
    save_file(first | {"lm_head.weight": torch.zeros(64, 32)}, files[0])
    second = load_file(files[1])
    second.pop(lost := sorted(second)[0])
    save_file(second | {name: first[name] for name in list(first)[:1]}, files[1])
    text = refused(folder)
    assert f"{files[-1].name}: No such file or directory" in text
    assert (
        f"{lost}: model.safetensors.index.json puts it into {files[1].name}, which lacks it" in text
    )
    assert f"{next(iter(first))}: in {files[0].name} and again in {files[1].name}" in text


def test_numbers_that_are_not_finite(exported):
    folder, tensors, write = exported
    tensors["model.layers.2.mlp.experts.3.down_proj.weight"][0, 0] = float("nan")
    tensors["model.layers.1.mlp.gate.e_score_correction_bias"][1] = float("inf")
    write(tensors)
    text = refused(folder)
    assert "2 problem(s)" in text and "experts.3.down_proj.weight: holds nan or infinity" in text


def test_fp8_without_its_scales_or_its_config(make_run, tmp_path):
    run, _ = make_run()
    folder = tmp_path / "hf"
    export_hf(run, folder, dtype="fp8")
    file = next(folder.glob("*.safetensors"))
    tensors = load_file(file)
    del tensors["model.layers.0.self_attn.o_proj.weight_scale_inv"]
    tensors["model.layers.0.mlp.up_proj.weight_scale_inv"] = torch.ones(2, 2)
    (folder / "model.safetensors.index.json").unlink()
    save_file(tensors, file)
    text = refused(folder)
    assert "o_proj.weight_scale_inv: missing" in text
    assert "up_proj.weight_scale_inv: is F32 [2, 2], not F32 [1, 1]" in text
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    assert "is FP8, but config.json has no quantization_config" in refused(folder)


def test_promised_modules_that_are_missing_name_the_way_out(exported, tmp_path):
    folder, tensors, write = exported
    write(
        {name: value for name, value in tensors.items() if not name.startswith("model.layers.3.")}
    )
    assert "take the trunk with --trunk-only" in refused(folder)
    import_hf(folder, tmp_path / "trunk", trunk_only=True)


SETTINGS = {
    "model_type": ("deepseek_v2", "model_type: 'deepseek_v2' is not supported, only 'deepseek_v3'"),
    "hidden_act": ("gelu", "hidden_act"),
    "scoring_func": ("softmax", "scoring_func"),
    "topk_method": ("group_limited_greedy", "topk_method"),
    "moe_layer_freq": (2, "moe_layer_freq"),
    "attention_bias": (True, "attention_bias"),
    "tie_word_embeddings": (True, "tie_word_embeddings"),
    "rope_interleave": (False, "rope_interleave"),
    "mtp_hidden_states_first": (True, "mtp_hidden_states_first"),
    "num_key_value_heads": (1, "latent attention has no groups"),
    "num_nextn_predict_layers": (-1, "num_nextn_predict_layers: must be a number >= 0"),
    "rope_scaling": (
        {"type": "linear", "factor": 2.0},
        "type 'linear' is not supported, only 'yarn'",
    ),
    "quantization_config": ({"quant_method": "gptq"}, "quant_method 'gptq' is not supported"),
    "qk_rope_head_dim": (3, "qk_rope_head_dim"),
    "hidden_size": (None, "hidden_size"),
}


def test_every_setting_that_this_code_does_not_compute_is_listed(exported):
    folder, _, _ = exported
    config = json.loads((folder / "config.json").read_text())
    for key, (value, reason) in SETTINGS.items():
        (folder / "config.json").write_text(json.dumps(config | {key: value}))
        assert reason in refused(folder), key
    (folder / "config.json").write_text(
        json.dumps(config | {"hidden_act": "gelu", "scoring_func": "softmax"})
    )
    assert "2 problem(s)" in refused(folder)


def test_the_runs_own_config_is_checked_and_must_fit(exported):
    folder, _, _ = exported
    text = refused(folder, sets=["optm.lr=1", "train.freeze=trunk"])
    assert "optm: unknown key; did you mean 'optim'?" in text
    text = refused(
        folder, sets=["mtp.trunk_hidden=pre_norm", "mtp.embed=false", "model.rms_norm_eps=1e-5"]
    )
    for reason in ("mtp.trunk_hidden: pre_norm", "mtp.embed: False", "model.rms_norm_eps: 1e-05"):
        assert reason in text


def test_an_existing_folder_is_never_touched(exported, make_run, tmp_path):
    folder, _, _ = exported
    with pytest.raises(ValueError, match="exists already"):
        import_hf(folder, tmp_path / "runs" / "run")
    with pytest.raises(ValueError, match="exists already"):
        export_hf(tmp_path / "runs" / "run", folder)


# --- the command line -----------------------------------------------------------------------------


def tool(name: str, *arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-X", "importtime", str(ROOT / "tools" / f"{name}.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


@pytest.mark.parametrize("name", ["export_hf", "import_hf", "evaluate"])
def test_help_comes_without_torch(name):
    done = tool(name, "--help")
    assert done.returncode == 0 and "Exit codes" in done.stdout
    assert "torch" not in done.stderr


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("export_hf", ("--run", "nowhere", "--out", "OUT"), "error: nowhere/config.yaml"),
        ("import_hf", ("--from", "nowhere", "--out", "OUT"), "error: nowhere: no such folder"),
        ("evaluate", ("--run", "nowhere"), "error: nowhere: no config.yaml there"),
    ],
)
def test_a_user_error_is_one_report_with_exit_code_2(tmp_path, name, arguments, message):
    arguments = [str(tmp_path / "out") if argument == "OUT" else argument for argument in arguments]
    code, output = run_tool(ROOT / "tools" / f"{name}.py", *arguments, log=tmp_path / "log")
    assert code == 2
    assert message in output and "Traceback" not in output
    assert left_behind(tmp_path) == ["log.rank0"]


@pytest.mark.parametrize(
    ("name", "patched", "arguments"),
    [
        ("export", "dsv3_mtp.hf.export_hf", ["--run", "x", "--out", "y"]),
        ("import", "dsv3_mtp.hf.import_hf", ["--from", "x", "--out", "y"]),
        ("evaluate", "dsv3_mtp.train.validation.open_model", ["--run", "x"]),
    ],
)
def test_an_interrupt_is_one_line_and_exit_code_130(monkeypatch, capsys, name, patched, arguments):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(patched, interrupt)
    assert command.run(name, arguments) == 130
    assert capsys.readouterr().err.startswith("interrupted")
