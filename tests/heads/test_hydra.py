"""Hydra's heads against their equation, written out slot by slot in float64."""

import pytest
import torch

from dsv3_mtp.model.causal_lm import DeepseekV3MTP
from dsv3_mtp.model.layers import rotary_angles
from tests.conftest import tiny

T, D = 6, 2


@pytest.mark.parametrize(("layers", "prefix"), [(1, False), (3, True)])
@torch.no_grad()
def test_the_losses_are_those_of_the_equation(layers, prefix):
    keys = {"num_nextn_predict_layers": D, "num_layers": layers, "prefix": prefix}
    config = tiny({"mtp.mode": "hydra", **{f"mtp.{key}": value for key, value in keys.items()}})
    model = DeepseekV3MTP(config.model, config.mtp)
    model.init_weights(1)
    for head in model.double().mtp.heads:
        assert torch.equal(head.lm_head.weight, model.lm_head.weight)  # the start
        for layer in head.layers:
            assert not layer.weight.any()
            layer.weight.normal_(0, 0.3)
    tokens = torch.randint(64, (2, T + 1 + D))
    h = model.head_rows(tokens).rows[0].inputs[0]
    if prefix:
        layer, angles = model.mtp.prefix, rotary_angles(model.config, torch.arange(T))
        h = layer.shared_head(layer(h, angles, None)[0])
    expected = []
    for k, head in enumerate(model.mtp.heads, start=1):
        total = 0.0
        for row in range(len(tokens)):
            for i in range(T):
                x = torch.cat(
                    [h[row, i], *(model.model.embed_tokens.weight[tokens[row, i + 1 : i + 1 + k]])]
                )
                inner = head.layers[0].weight @ x
                y = head.residual.weight @ x + inner * inner.sigmoid()
                for layer in head.layers[1:]:
                    inner = layer.weight @ y
                    y = y + inner * inner.sigmoid()
                exponentials = (head.lm_head.weight @ y).exp()
                total -= float((exponentials[tokens[row, i + k + 1]] / exponentials.sum()).log())
        expected.append(total)
    assert model(tokens).nll_sum[1:].tolist() == pytest.approx(expected)
