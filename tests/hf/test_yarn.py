"""YaRN as a stranger's config.json says it, against transformers' rotary embedding."""

import json

import pytest
import torch

from dsv3_mtp.hf.settings import read_settings, representable, to_config_json
from dsv3_mtp.model.layers import rotary_angles

YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
FORMS = {
    "released": {"mscale": 0.707, "mscale_all_dim": 0.707},
    "truncated by name": {"mscale": 1.0, "mscale_all_dim": 1.0, "truncate": True},
    "not truncated": {"mscale": 1.0, "mscale_all_dim": 1.0, "truncate": False},
    "not truncated, other borders": {"beta_fast": 9.0, "beta_slow": 0.4, "truncate": False},
    "attention_factor": {"attention_factor": 1.2},
    "attention_factor 1": {"attention_factor": 1.0},
    "attention_factor, softmax scale": {"attention_factor": 1.1, "mscale_all_dim": 0.5},
    "attention_factor below 1": {"attention_factor": 0.97, "mscale_all_dim": 1.0},
}


@pytest.fixture
def settings_of(make_tiny_config, tmp_path):
    def read(rope_scaling, **more):
        model = make_tiny_config({"model.qk_rope_head_dim": 16}).model
        content = to_config_json(model, 1, dtype="bf16", special_ids={}) | more
        content["rope_scaling"] = rope_scaling
        (tmp_path / "config.json").write_text(json.dumps(content))
        return read_settings(tmp_path), content

    return read


@pytest.mark.parametrize("form", FORMS)
def test_angles_are_those_of_transformers(settings_of, form):
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RotaryEmbedding

    settings, content = settings_of(YARN | FORMS[form], max_position_embeddings=64)
    positions = torch.arange(64)
    config = DeepseekV3Config(**content)
    cos, sin = DeepseekV3RotaryEmbedding(config)(torch.zeros(1, 1), positions[None])
    theirs = torch.stack([cos, sin])[:, 0, :, :8]  # they repeat the pairs
    torch.testing.assert_close(
        rotary_angles(settings.model, positions), theirs, rtol=2e-6, atol=1e-5
    )


@pytest.mark.parametrize(
    ("scaling", "said"),
    [
        ({"attention_factor": 0.5}, "attention_factor 0.5: no mscale >= 0 gives it"),
        ({"attention_factor": "x"}, "must be numbers"),
        ({"attention_factor": float("inf")}, "no mscale"),
        ({"factor": 1.0, "attention_factor": 2.0}, "no mscale"),
        ({"truncate": "x"}, "truncate"),
    ],
)
def test_what_cannot_be_said_is_refused(settings_of, scaling, said):
    with pytest.raises(ValueError, match=said):
        settings_of(YARN | scaling)


def test_what_transformers_alone_knows_is_not_exported(settings_of, make_tiny_config):
    settings, _ = settings_of(YARN | FORMS["not truncated"])
    with pytest.raises(ValueError, match="truncate: false: transformers alone knows it"):
        representable(settings.model, make_tiny_config().mtp, trunk_only=False)
    settings, content = settings_of(YARN | FORMS["released"])
    again = to_config_json(settings.model, 1, dtype="bf16", special_ids={})["rope_scaling"]
    assert again.items() >= content["rope_scaling"].items() and "truncate" not in again
