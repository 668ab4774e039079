"""Token order prediction against its definition: a loop over the vocabulary, in float64."""

import math

import pytest
import torch

from dsv3_mtp.model.causal_lm import DeepseekV3MTP
from tests.conftest import tiny

T, D, V = 10, 4, 64


@pytest.fixture(scope="module")
def model() -> DeepseekV3MTP:
    config = tiny({"mtp.mode": "top", "mtp.num_nextn_predict_layers": D, "mtp.loss_weight": 0.0})
    model = DeepseekV3MTP(config.model, config.mtp)
    model.init_weights(1)
    return model.double()


def listnet(tokens: list[int], valid: list[bool], logits: torch.Tensor) -> torch.Tensor:
    """- sum_v softmax(y)_v log softmax(logits)_v of one window; tokens: t_{i+1} .. t_{i+1+D}."""
    score = {}
    for distance in reversed(range(1 + D)):
        if valid[distance]:
            score[tokens[distance]] = D - distance  # the nearest is written last
    total = sum(math.exp(y) for y in score.values())
    log_q = logits.log_softmax(-1)
    return -sum((math.exp(y) / total * log_q[v] for v, y in score.items()), start=torch.tensor(0.0))


@pytest.mark.parametrize("masked", [False, True])
def test_the_loss_is_listnet_over_the_window(model, masked):
    tokens = torch.randint(6, (3, T + 1 + D))  # of few tokens: most come more than once
    documents = (torch.arange(tokens.shape[1]) // 6).expand_as(tokens) if masked else None
    model.zero_grad()
    out = model(tokens, documents)
    out.loss.backward()
    got = model.mtp.head.weight.grad
    states = model.head_rows(tokens, documents).rows[0].inputs[0]
    logits, losses = states @ model.mtp.head.weight.T, []
    for row in range(len(tokens)):
        for i in range(T):
            window = range(i + 1, i + 2 + D)
            valid = [not masked or bool(documents[row, j] == documents[row, i]) for j in window]
            if any(valid):
                losses.append(listnet([int(tokens[row, j]) for j in window], valid, logits[row, i]))
    assert out.term_count.tolist() == [len(losses)] and (len(losses) < 3 * T) == masked
    want = torch.stack(losses).mean()
    assert (out.term_sum / out.term_count).item() == pytest.approx(want.item(), rel=1e-12)
    main = out.nll_sum[0] / out.targets[0]
    assert out.loss.item() == pytest.approx((main + want).item(), rel=1e-6)
    [expected] = torch.autograd.grad(want, [model.mtp.head.weight])
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)


@torch.no_grad()
def test_a_head_that_knows_the_window_reaches_the_entropy_of_its_target(model):
    """The lowest loss there is: logits that are the scores themselves."""
    from dsv3_mtp.heads.top import window_weights

    targets = torch.tensor([5, 7, 5, 9, 7]).view(-1, 1, 1)
    weights = window_weights(targets, torch.ones_like(targets, dtype=torch.bool), torch.float64)
    raw = torch.tensor([math.exp(4), math.exp(3), 0.0, math.exp(1), 0.0], dtype=torch.float64)
    torch.testing.assert_close(weights.flatten(), raw / raw.sum())
