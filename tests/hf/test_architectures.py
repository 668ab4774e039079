"""config.json as other makers of DeepseekV3ForCausalLM write it, each on a tiny model: the values
of the keys are theirs, the sizes are not.
"""

import json

import pytest
import torch

from dsv3_mtp.config import load_config
from dsv3_mtp.hf import export_hf, import_hf, load_hf
from dsv3_mtp.plan.outlook import outlook

# moonshotai/Moonlight-16B-A3B
MOONLIGHT = {
    "model__q_lora_rank": None,
    "model__n_group": 1,
    "model__topk_group": 1,
    "model__n_shared_experts": 2,
    "model__rope_theta": 50000.0,
    "model__rms_norm_eps": 1e-5,
    "model__routed_scaling_factor": 2.446,
}
MOONLIGHT_KEYS = {
    "_name_or_path": "moonlight",
    "auto_map": {"AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM"},
    "aux_loss_alpha": 0.001,
    "seq_aux": True,
    "ep_size": 1,
    "pretraining_tp": 1,
    "num_nextn_predict_layers": 0,
    "transformers_version": "4.46.3",
    "rope_scaling": None,
    "pad_token_id": None,
}
# moonshotai/Kimi-K2-Instruct
KIMI = {
    "model__n_group": 1,
    "model__topk_group": 1,
    "model__rope_theta": 50000.0,
    "model__routed_scaling_factor": 2.827,
    "model__rope_scaling": {
        "type": "yarn",
        "factor": 32.0,
        "original_max_position_embeddings": 16,
        "beta_fast": 1.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
    "model__max_position_embeddings": 512,
}
KIMI_KEYS = MOONLIGHT_KEYS | {"model_type": "kimi_k2", "num_nextn_predict_layers": 0}
del KIMI_KEYS["rope_scaling"]
MAKERS = {"moonlight": (MOONLIGHT, MOONLIGHT_KEYS), "kimi_k2": (KIMI, KIMI_KEYS)}


@pytest.fixture
def made(make_run, tmp_path):
    """A function from a maker's name to a folder as it publishes one, without a tokenizer.json."""

    def make(name, dtype="bf16"):
        shape, keys = MAKERS[name]
        run, _ = make_run(name, mtp__mode="none", **shape)
        folder = tmp_path / f"hf_{name}"
        export_hf(run, folder, dtype=dtype)
        path = folder / "config.json"
        content = json.loads(path.read_text()) | keys
        path.write_text(json.dumps(content))
        for file, text in (
            ("tiktoken.model", "IQ== 0\n"),
            ("tokenization_kimi.py", "class Tokenizer: ...\n"),
            ("tokenizer_config.json", '{"tokenizer_class": "TikTokenTokenizer"}'),
        ):
            (folder / file).write_text(text)
        return folder

    return make


@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
@pytest.mark.parametrize("name", MAKERS)
def test_other_makers_folders_are_read_as_transformers_reads_them(made, name, dtype):
    transformers = pytest.importorskip("transformers")
    folder = made(name, dtype)
    ours, tokenizer = load_hf(folder)
    assert tokenizer is None and ours.depths == 0
    content = json.loads((folder / "config.json").read_text())
    content.pop("auto_map")
    content.pop("quantization_config", None)  # the weights are given below
    config = transformers.DeepseekV3Config(**content | {"model_type": "deepseek_v3"})
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    theirs = transformers.DeepseekV3ForCausalLM(config).eval().float()
    ours = ours.float()
    for module_name, module in theirs.named_modules():
        if module_name.endswith("_a_layernorm"):  # which transformers norms with 1e-6 (docs)
            module.variance_epsilon = ours.config.rms_norm_eps
    state = theirs.state_dict()
    for key, value in ours.state_dict().items():
        assert state[key].shape == value.shape, key
        state[key].copy_(value)
    tokens = torch.randint(0, ours.config.vocab_size, (2, 16))
    with torch.no_grad():
        expected = theirs(tokens[:, :-1]).logits
        found = ours.logits(tokens)[0]
    assert (found - expected).abs().max() <= 2e-6 * expected.abs().max()


@pytest.mark.parametrize("name", MAKERS)
def test_a_module_is_trained_on_them_where_they_are(made, tmp_path, name):
    folder = made(name)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    notes = import_hf(folder, tmp_path / "runs" / "head", frozen=True)
    assert any("has no tokenizer.json: only data that is tokenised already" in n for n in notes)
    assert any("make one of tiktoken.model" in note for note in notes)
    config = load_config(tmp_path / "runs/head/config.yaml")
    assert (config.train.freeze, config.mtp.detach) == ("trunk", "all")
    assert config.mtp.loss_weight.value == 1.0 and config.mtp.depths == 1
    assert [path.name for path in (tmp_path / "runs/head").iterdir()] == ["config.yaml"]
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}
    [hours, command] = outlook(tmp_path / "runs/head")
    step = config.train.batch_size * config.data.seq_len
    assert f": {-(-config.train.total_tokens // step):,} steps of {step:,} tokens, about" in hours
    assert " on one device" in hours and "tokens/s (30% of" in hours
    assert command.endswith("runs/head/config.yaml")


@pytest.mark.parametrize("model_type", ["llama", "qwen3_moe", "kimi_k25", None])
def test_another_architecture_is_one_line(tmp_path, model_type):
    (tmp_path / "hf").mkdir()
    content = {"architectures": ["X"], "hidden_size": 64, "num_key_value_heads": 2}
    content |= {} if model_type is None else {"model_type": model_type}
    (tmp_path / "hf/config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="is not supported, only 'deepseek_v3' and") as error:
        import_hf(tmp_path / "hf", tmp_path / "run")
    assert len(str(error.value).splitlines()) == 1 and repr(model_type) in str(error.value)
    assert not (tmp_path / "run").exists()
