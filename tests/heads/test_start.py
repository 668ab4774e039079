"""Heads that start from the trunk's weights, and what stops them from doing so."""

from contextlib import nullcontext

import pytest
import torch

from dsv3_mtp.heads.base import copy_weights
from dsv3_mtp.model.causal_lm import DeepseekV3MTP, meta_model
from tests.conftest import tiny

MODE = {"mtp.mode": "tests.example_heads:ConfidenceHead", "mtp.num_nextn_predict_layers": 2}


def test_heads_start_as_the_trunk_s_last_layer_and_again_once_a_trunk_is_loaded():
    config = tiny(MODE)
    model = DeepseekV3MTP(config.model, config.mtp)
    model.init_weights(0)
    for _ in range(2):
        state, heads = model.model.layers[-1].state_dict(), model.mtp.layers
        assert all(
            torch.equal(head.state_dict()[name], state[name]) for head in heads for name in state
        )
        assert all(
            torch.equal(head.shared_head.norm.weight, model.model.norm.weight) for head in heads
        )
        for tensor in (*model.model.parameters(), *model.model.buffers()):  # as if one were loaded
            tensor.data.add_(1)
        model.start_heads()


def test_weights_of_another_stage_and_of_another_module_are_refused():
    config = tiny(MODE)
    model = meta_model(config.model, config.mtp)  # as the stages that a rank does not have
    model.mtp.to_empty(device="cpu")
    model.lm_head.to_empty(device="cpu")
    with pytest.raises(ValueError, match=r"pipeline_stages: heads start from weights of the trunk"):
        model.start_heads()
    wrong = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2, bias=False)
    with pytest.raises(ValueError, match="only one has bias"):
        copy_weights(*wrong, nullcontext)
