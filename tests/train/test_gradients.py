"""The angle between the main loss's and the heads' gradients, against gradients made one by one."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from dsv3_mtp.model.causal_lm import DeepseekV3MTP
from dsv3_mtp.train.gradients import gradient_angle
from tests.conftest import tiny
from tests.made_runs import randomise

WEIGHTS = (0.2, 0.1)


def engine_of(model: DeepseekV3MTP) -> SimpleNamespace:
    return SimpleNamespace(model=model, own=lambda batch: batch, all_reduce=lambda x: x)


@pytest.mark.parametrize("mode", ["sequential", "parallel"])
def test_the_angle_is_that_of_gradients_made_one_by_one(mode: str):
    config = tiny({"mtp.mode": mode, "mtp.num_nextn_predict_layers": 2})
    model = randomise(DeepseekV3MTP(config.model, config.mtp)).double()
    tokens = torch.randint(config.model.vocab_size, (2, 16 + 1 + 2))
    got = gradient_angle(engine_of(model), [(tokens, None, None)], WEIGHTS)

    logits = model.logits(tokens)  # (1+D, B, T, V)
    losses = [
        F.cross_entropy(logits[k].flatten(0, 1), tokens[:, k + 1 : k + 17].flatten())
        for k in range(3)
    ]
    trunk = [*model.model.parameters(), *model.lm_head.parameters()]

    def gradient(loss: torch.Tensor) -> torch.Tensor:
        found = torch.autograd.grad(loss, trunk, retain_graph=True, materialize_grads=True)
        return torch.cat([part.flatten() for part in found])

    main = gradient(losses[0])
    heads = gradient(WEIGHTS[0] * losses[1] + WEIGHTS[1] * losses[2])
    cosine = F.cosine_similarity(main, heads, dim=0).item()
    assert got["optim/gradient_cosine"] == pytest.approx(cosine, abs=1e-5)
    assert got["optim/gradient_ratio"] == pytest.approx(
        (heads.norm() / main.norm()).item(), rel=1e-4
    )
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mtp.mode": "none"}, "needs heads whose gradients reach the trunk"),
        ({"mtp.detach": "all"}, "needs heads whose gradients reach the trunk"),
        ({"parallel.zero_stage": 3}, "needs whole parameters on every rank"),
        ({"log.every": 3}, "must be a multiple of log.every = 3"),
    ],
)
def test_where_there_is_no_angle_the_setting_is_refused(settings: dict, message: str):
    with pytest.raises(ValueError, match=message):
        tiny({"log.gradients": 4, "log.every": 2} | settings)
