"""The main logits against later tokens, in float64, and the weights with which they are trained."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from dsv3_mtp.config import load_config, schedules
from dsv3_mtp.model.causal_lm import DeepseekV3MTP
from dsv3_mtp.model.output import LossSettings
from tests.conftest import tiny

PRESET = Path(__file__).parents[2] / "configs/heads/same_logits.yaml"
T = 8


def test_the_loss_and_its_gradient_are_those_of_one_row_of_logits():
    config = tiny({"mtp.mode": "same_logits", "mtp.num_nextn_predict_layers": 2})
    model = DeepseekV3MTP(config.model, config.mtp)
    assert sum(p.numel() for p in model.mtp.parameters()) == 0
    model.init_weights(1)
    model = model.double()
    tokens = torch.randint(64, (2, T + 3))
    out = model(tokens, settings=LossSettings((0.5, 0.25)))
    out.loss.backward()
    got = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    logits = model.logits(tokens)[0].flatten(0, 1)
    losses = [F.cross_entropy(logits, tokens[:, k : k + T].flatten()) for k in (1, 2, 3)]
    loss = losses[0] + 0.5 * losses[1] + 0.25 * losses[2]
    assert out.loss.item() == pytest.approx(loss.item(), rel=1e-12)
    loss.backward()
    for mine, parameter in zip(got, model.parameters(), strict=True):
        torch.testing.assert_close(mine, parameter.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("progress", "weights"),
    [(0, (0.5, 0.25)), (1 / 6, (0.5, 0.125)), (1 / 3, (0.5, 0)), (0.5, (0.25, 0)), (0.7, (0, 0))],
)
def test_the_presets_weights_are_the_published_ones(progress, weights):
    mtp = load_config(PRESET).mtp
    assert schedules.depth_loss_weights(mtp, progress) == pytest.approx(weights, abs=1e-12)
