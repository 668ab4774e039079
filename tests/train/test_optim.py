"""AdamW with moments in bfloat16 against AdamW written out in float64, rounded at the same
places.
"""

import pytest
import torch
from torch import nn

from dsv3_mtp.config import OptimConfig
from dsv3_mtp.train import optim

BETA1, BETA2, EPS, DECAY, LR = 0.9, 0.95, 1e-8, 0.1, 1e-2


def test_bfloat16_moments_are_adamw_with_two_roundings(monkeypatch):
    monkeypatch.setattr(optim, "CHUNK", 100)  # 12 x 31 elements in chunks, the last one shorter
    layer = nn.Linear(31, 12, bias=False)
    optimizer = optim.build_optimizer(
        layer, OptimConfig(lr=LR, betas=(BETA1, BETA2), moments="bfloat16")
    )
    weight, first = layer.weight.detach().double(), torch.zeros(12, 31)
    second = first.clone()
    for step in range(1, 41):
        gradient = torch.randn(12, 31) * 10.0 ** torch.randint(-6, 2, (12, 1))
        layer.weight.grad = gradient.clone()
        optimizer.step()
        wide_first = BETA1 * first.double() + (1 - BETA1) * gradient.double()
        wide_second = BETA2 * second.double() + (1 - BETA2) * gradient.double() ** 2
        root = (wide_second / (1 - BETA2**step)).sqrt() + EPS
        weight = weight * (1 - LR * DECAY) - LR * wide_first / (1 - BETA1**step) / root
        # The optimizer's float32 may fall on the other side of a rounding boundary: its own moments
        # go on from here.
        state = optimizer.state[layer.weight]
        for wide, kept in ((wide_first, state["exp_avg"]), (wide_second, state["exp_avg_sq"])):
            assert kept.dtype == torch.bfloat16
            torch.testing.assert_close(kept.double(), wide, rtol=2**-8, atol=1e-30)
            assert (kept == wide.bfloat16()).float().mean() > 0.98
        first, second = state["exp_avg"].float(), state["exp_avg_sq"].float()
        torch.testing.assert_close(layer.weight.detach().double(), weight, rtol=1e-5, atol=1e-6)
    assert state["step"] == 40


@pytest.mark.parametrize(("beta2", "follows"), [(0.95, True), (0.999, False)])
def test_rounding_to_nearest_follows_the_second_moment_with_v3s_beta_and_not_with_a_long_memory(
    beta2, follows
):
    layer = nn.Linear(64, 64, bias=False)
    optimizer = optim.build_optimizer(layer, OptimConfig(betas=(0.9, beta2), moments="bfloat16"))
    exact = torch.zeros(64, 64, dtype=torch.double)
    for _ in range(400):
        layer.weight.grad = torch.randn(64, 64)
        optimizer.step()
        exact = beta2 * exact + (1 - beta2) * layer.weight.grad.double() ** 2
    ratio = (optimizer.state[layer.weight]["exp_avg_sq"].double() / exact).mean().item()
    assert (abs(ratio - 1) < 1e-3) == follows, ratio
