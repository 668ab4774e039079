"""RoPE with interleaved pairs, YaRN, RMSNorm, MLA's attention core."""

import math

import pytest
import torch
import torch.nn.functional as F

from dsv3_mtp.config import ModelConfig
from dsv3_mtp.model.attention import MLA
from dsv3_mtp.model.layers import RMSNorm, rotary_angles, yarn_mscale
from dsv3_mtp.ops.rotary import rotate

YARN = {
    "type": "yarn",
    "factor": 40.0,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32,
    "beta_slow": 1,
}


def model_config(make_tiny_config, **model) -> ModelConfig:
    return make_tiny_config({f"model.{key}": value for key, value in model.items()}).model


def test_rotation_is_complex_multiplication_of_interleaved_pairs(make_tiny_config):
    config = model_config(make_tiny_config)
    x = torch.randn(1, 6, 2, 4)
    got = rotate(x, rotary_angles(config, torch.arange(6)))
    for position in range(6):
        for pair, frequency in enumerate((1.0, 10000.0**-0.5)):
            z = torch.complex(x[0, position, :, 2 * pair], x[0, position, :, 2 * pair + 1])
            turned = z * torch.polar(torch.tensor(1.0), torch.tensor(position * frequency))
            torch.testing.assert_close(got[0, position, :, 2 * pair], turned.real)
            torch.testing.assert_close(got[0, position, :, 2 * pair + 1], turned.imag)


def test_scores_depend_on_the_distance_only(make_tiny_config):
    config = model_config(make_tiny_config)
    q, k = torch.randn(1, 1, 1, 4), torch.randn(1, 1, 1, 4)

    def score(i, j):
        at = [rotary_angles(config, torch.tensor([p])) for p in (i, j)]
        return (rotate(q, at[0]) * rotate(k, at[1])).sum().item()

    assert score(3, 1) == pytest.approx(score(12, 10), abs=1e-5)
    assert score(3, 1) != pytest.approx(score(3, 2), abs=1e-3)


def test_yarn_keeps_fast_pairs_and_interpolates_slow_ones():
    config = ModelConfig(
        vocab_size=8,
        **dict.fromkeys(("hidden_size", "intermediate_size", "moe_intermediate_size"), 8),
        **dict(num_hidden_layers=1, first_k_dense_replace=1, num_attention_heads=1),
        **dict(q_lora_rank=None, kv_lora_rank=8, v_head_dim=8),
        **dict(qk_nope_head_dim=8, qk_rope_head_dim=64),
        **dict(n_routed_experts=2, n_shared_experts=1, num_experts_per_tok=1),
        **dict(n_group=1, topk_group=1, max_position_embeddings=163840, rope_scaling=YARN),
    )
    plain = config.model_copy(update={"rope_scaling": None})
    one = torch.tensor([1])
    ratio = (
        torch.atan2(*rotary_angles(config, one).flip(0))
        / torch.atan2(*rotary_angles(plain, one).flip(0))
    ).flatten()
    assert ratio[0] == pytest.approx(1.0) and ratio[-1] == pytest.approx(1 / 40, rel=1e-5)
    assert (ratio.diff() <= 1e-6).all()
    assert yarn_mscale(40.0, 1.0) == pytest.approx(0.1 * math.log(40) + 1)
    assert MLA(config).scale == pytest.approx(MLA(plain).scale * yarn_mscale(40.0, 1.0) ** 2)


def test_rmsnorm_equals_its_definition_and_torchs():
    norm = RMSNorm(16, 1e-6)
    norm.weight.data = torch.rand(16)
    x = torch.randn(3, 16)
    torch.testing.assert_close(norm(x), F.rms_norm(x, (16,), norm.weight, 1e-6))
    assert norm(x.bfloat16()).dtype == torch.promote_types(torch.float32, torch.bfloat16)
