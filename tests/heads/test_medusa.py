"""Medusa's heads and leaps against their equations, in float64."""

import pytest
import torch

from dsv3_mtp.hf import export_hf
from dsv3_mtp.hf.load import load_weights
from dsv3_mtp.model.causal_lm import DeepseekV3MTP
from tests.conftest import tiny
from tests.made_runs import write_run

T = 6


def build(mode: str, **options) -> DeepseekV3MTP:
    keys = {f"mtp.{key}": value for key, value in options.items()}
    config = tiny({"mtp.mode": mode, "mtp.num_nextn_predict_layers": 2, **keys})
    model = DeepseekV3MTP(config.model, config.mtp)
    model.init_weights(1)
    return model.double()


def by_hand(model: DeepseekV3MTP, tokens: torch.Tensor, stride: int) -> list[float]:
    """The summed -log q_k(t_{i+sk+1}) of every depth, slot by slot."""
    states = model.head_rows(tokens).rows[0].inputs[0]
    sums = []
    for k, head in enumerate(model.mtp.heads, start=1):
        total = 0.0
        for row in range(len(tokens)):
            for i in range(T):
                h = states[row, i]
                inner = head.linear.weight @ h
                logits = head.lm_head.weight @ (inner / (1 + (-inner).exp()) + h)
                exponentials = logits.exp()
                target = tokens[row, i + stride * k + 1]
                total -= float((exponentials[target] / exponentials.sum()).log())
        sums.append(total)
    return sums


@pytest.mark.parametrize(("mode", "stride"), [("medusa", 1), ("leap", 2), ("leap", 3)])
@torch.no_grad()
def test_the_losses_are_those_of_the_equation(mode, stride):
    model = build(mode, **({"stride": stride} if mode == "leap" else {}))
    assert model.lookahead == 1 + 2 * stride
    for head in model.mtp.heads:
        head.linear.weight.normal_()  # it starts at 0
    tokens = torch.randint(64, (2, T + model.lookahead))
    assert model(tokens).nll_sum[1:].tolist() == pytest.approx(by_hand(model, tokens, stride))


@torch.no_grad()
def test_at_the_start_every_head_says_what_the_main_head_says_and_of_an_imported_trunk_as_well(
    tmp_path,
):
    model, tokens = build("medusa"), torch.randint(64, (2, T + 3))
    main, *heads = model.logits(tokens)
    assert all(torch.equal(main, logits) for logits in heads)
    config = tiny({"train.dtype": "float32"})
    donor = DeepseekV3MTP(config.model, config.mtp)
    donor.init_weights(2)
    donor.lm_head.weight.normal_()
    run = write_run(tmp_path / "run", config, donor)
    export_hf(run, tmp_path / "hf", trunk_only=True, dtype="fp32")
    load_weights(model, tmp_path / "hf")
    assert torch.equal(model.lm_head.weight.float(), donor.lm_head.weight)
    assert all(torch.equal(h.lm_head.weight, model.lm_head.weight) for h in model.mtp.heads)


def test_leaps_draft_s_tokens_of_each_head_from_the_last_s_slots():
    mtp = build("leap").mtp_config
    drafter = mtp.kind.drafter(mtp)
    assert [drafter.limit(mtp, depth) for depth in (1, 4, 9)] == [1, 4, mtp.drafts]
    for number in range(1, 5):  # each is the guess of a depth that aims at t_{m+number}
        depth, back = drafter.origin(mtp, number)
        assert -1 - back + mtp.kind.offset(mtp, depth) == number and 0 <= back < 2
