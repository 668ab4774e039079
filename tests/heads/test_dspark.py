"""The block drafter against DSpark's loss written out, and its confidence as a stop."""

import pytest
import torch
import torch.nn.functional as F

from dsv3_mtp.decode.generate import generate
from dsv3_mtp.decode.generation import Settings
from dsv3_mtp.heads.dspark import DSparkDrafter
from dsv3_mtp.model.causal_lm import DeepseekV3MTP
from dsv3_mtp.model.output import LossSettings
from tests.conftest import tiny
from tests.made_runs import randomise

T, D, BETA = 10, 3, 0.7788  # exp(-1/4)
MODE = {
    "mtp.mode": "dspark",
    "mtp.num_nextn_predict_layers": D,
    "mtp.depth_weights": {"type": "exponential", "beta": BETA},
    "mtp.objective": {"ce": 0.1, "tv": 1.8},
    "mtp.detach": "all",
    "mtp.loss_weight": 1.0,
}


def make(more: dict | None = None) -> DeepseekV3MTP:
    config = tiny({"model.initializer_range": 0.2, **MODE, **(more or {})})
    return randomise(DeepseekV3MTP(config.model, config.mtp).double())


def test_the_loss_is_dsparks_with_one_denominator_for_the_block():
    """0.1 CE + 0.9 L1 + BCE of the confidence to 1 - L1 / 2, positions weighted by exp(-(k-1)/4),
    each sum over one sum of weights: in documents of 2 to 5 tokens the depths have unequal counts.
    """
    model = make()
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(64, (2, T + model.lookahead), generator=generator)
    documents = torch.tensor([[0, 0, 1, 1, 1, 2, 2, 2, 2, 2, 3, 3, 3, 4]] * 2)
    loss = model(tokens, documents).loss
    loss.backward()
    got = {name: p.grad.clone() for name, p in model.mtp.named_parameters()}
    model.zero_grad()

    output, logits = model.head_rows(tokens, documents), model.logits(tokens, documents)
    confidence = output.kept["confidence"]
    sums, weights = torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    for k in range(1, 1 + D):
        w = BETA ** (k - 1)
        for row in range(2):
            for i in range(T):
                if documents[row, i + k + 1] != documents[row, i]:
                    continue
                q = logits[k, row, i].softmax(-1)
                sums[0] = sums[0] - w * q[tokens[row, i + k + 1]].log()
                weights[0] += w
                if i + k < T:
                    l1 = (q - logits[0, row, i + k].detach().softmax(-1)).abs().sum()
                    target = 1 - l1.detach() / 2
                    bce = F.binary_cross_entropy_with_logits(confidence[k - 1, row, i], target)
                    sums = sums + torch.stack([l1 * 0, w * l1, w * bce])
                    weights[1:] += w
    own = (torch.tensor([0.1, 0.9, 1.0], dtype=torch.float64) * sums / weights).sum()
    settings = LossSettings(loss_weights=(0.0,) * D)
    trunk = model(tokens, documents, settings=settings)
    main = trunk.nll_sum[0] / trunk.targets[0]
    assert loss.item() == pytest.approx((main + own).item(), rel=1e-9)
    own.backward()
    for name, parameter in model.mtp.named_parameters():
        torch.testing.assert_close(got[name], parameter.grad, rtol=1e-7, atol=1e-10, msg=name)


def test_nothing_of_a_gradient_reaches_the_trunk_embedding_and_output_head():
    model = make()
    model(torch.arange(2 * (T + model.lookahead)).view(2, -1) % 64).loss.backward()
    plain = make(
        {"mtp.mode": "none", "mtp.depth_weights": None, "mtp.objective": {"ce": 1.0}}
        | {"mtp.detach": "none"}
    )
    plain.load_state_dict(model.state_dict(), strict=False)
    plain(torch.arange(2 * (T + model.lookahead)).view(2, -1)[:, : T + 1] % 64).loss.backward()
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(model.get_parameter(name).grad, parameter.grad, msg=name)


def test_drafts_end_where_the_confidence_of_the_training_forward_is_too_low(monkeypatch):
    """It has read the draft before d_k, and not d_k."""
    model = make({"model.max_position_embeddings": 32}).requires_grad_(False).eval()
    seen, draft = [], DSparkDrafter.draft

    def record(self, ids, last, count, sampler):
        known = ids[0, : last[0] + 1].tolist()
        drafts, probability = draft(self, ids, last, count, sampler)
        seen.append((known, drafts[0].tolist(), count, int(sampler.lengths)))
        return drafts, probability

    monkeypatch.setattr(DSparkDrafter, "draft", record)
    model.mtp.confidence_head.weight.mul_(20)
    generate(model, [[5, 9]], Settings(24, draft_depth=D, draft_threshold=0.5))
    for known, drafts, count, length in seen:
        tokens = torch.tensor([[*known, *drafts, *[0] * model.lookahead]])
        found = model.head_rows(tokens).kept["confidence"][:, 0, len(known) - 2].sigmoid()
        enough = (found[: len(drafts)] >= 0.5).long().cumprod(0).sum()
        assert length == enough and len(drafts) == min(length + 1, count)
    assert {length for *_, length in seen} > {0}
