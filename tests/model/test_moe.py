"""Routing by hand (V3 eqs. 12-20), the balance loss in closed form, dispatch against a loop over
experts.
"""

import pytest
import torch
import torch.nn.functional as F

from dsv3_mtp.model.moe import Gate, MoE
from dsv3_mtp.ops.router import router_logits


def config_of(make_tiny_config, **model):
    return make_tiny_config({f"model.{key}": value for key, value in model.items()}).model


def gate_with_scores(config, scores):
    """A gate whose scores for a one-hot token i are scores[i]."""
    gate = Gate(config)
    scores = torch.tensor(scores)
    x = F.one_hot(torch.arange(len(scores)), config.hidden_size).float()
    gate.weight.data.zero_()
    gate.weight.data[:, : len(scores)] = torch.logit(scores).T
    return gate, x.unsqueeze(0)  # (1, tokens, C)


def test_groups_are_ranked_by_their_two_best_and_experts_come_from_those_groups_only(
    make_tiny_config,
):
    config = config_of(
        make_tiny_config, n_group=4, topk_group=2, num_experts_per_tok=2, routed_scaling_factor=2.5
    )
    # sums of the groups' pairs: 0.91, 1.0, 0.9, 0.95 -> groups 1 and 3
    scores = [0.90, 0.01, 0.50, 0.50, 0.45, 0.45, 0.60, 0.35]
    gate, x = gate_with_scores(config, [scores])
    chosen, gates, _ = gate(x)
    order = chosen[0].argsort()
    assert chosen[0][order].tolist() in ([2, 6], [3, 6])  # not expert 0, the best of all
    torch.testing.assert_close(gates[0][order], torch.tensor([0.5, 0.6]) / 1.1 * 2.5)


def test_nodes_are_the_groups_that_a_tokens_experts_lie_in(make_tiny_config):
    gate = Gate(config_of(make_tiny_config, n_group=4))
    assert (
        gate.count_nodes(torch.tensor([[0, 1], [0, 2], [6, 7], [7, 0], [3, 4]]))
        == 1 + 2 + 1 + 2 + 2
    )
    everywhere = Gate(config_of(make_tiny_config, n_group=1, topk_group=1))
    assert everywhere.count_nodes(torch.tensor([[0, 1], [0, 2]])) == 2


def test_bias_changes_the_choice_and_not_the_gates(make_tiny_config):
    config = config_of(
        make_tiny_config, n_group=1, topk_group=1, num_experts_per_tok=2, routed_scaling_factor=1.0
    )
    gate, x = gate_with_scores(config, [[0.9, 0.8, 0.3, 0.2, 0.1, 0.1, 0.1, 0.1]])
    assert set(gate(x)[0][0].tolist()) == {0, 1}
    gate.e_score_correction_bias[2] = 1.0
    chosen, gates, _ = gate(x)
    assert set(chosen[0].tolist()) == {0, 2}
    by_expert = dict(zip(chosen[0].tolist(), gates[0].tolist(), strict=True))
    assert by_expert == pytest.approx({0: 0.9 / 1.2, 2: 0.3 / 1.2})


def test_a_strongly_negative_bias_never_lets_a_masked_group_in(make_tiny_config):
    config = config_of(make_tiny_config, n_group=4, topk_group=1, num_experts_per_tok=2)
    gate, x = gate_with_scores(config, [[0.1, 0.1, 0.9, 0.9, 0.1, 0.1, 0.1, 0.1]])
    gate.e_score_correction_bias.fill_(-5.0)
    assert set(gate(x)[0][0].tolist()) == {2, 3}


def test_norm_topk_prob_false_keeps_the_raw_scores(make_tiny_config):
    config = config_of(
        make_tiny_config, n_group=1, topk_group=1, norm_topk_prob=False, routed_scaling_factor=3.0
    )
    gate, x = gate_with_scores(config, [[0.9, 0.8, 0.3, 0.2, 0.1, 0.1, 0.1, 0.1]])
    torch.testing.assert_close(gate(x)[1].sort().values, torch.tensor([[2.4, 2.7]]))


def test_the_bias_step_moves_the_load_towards_balance(make_tiny_config):
    config = config_of(make_tiny_config, n_group=1, topk_group=1, num_experts_per_tok=1)
    gate = Gate(config)
    gate.weight.data.zero_()
    gate.weight.data[0, 0] = 1.0  # expert 0 wins every token with x_0 > 0
    x = torch.rand(1, 512, config.hidden_size)
    with torch.no_grad():
        gate.weight.data += 0.01 * torch.randn_like(gate.weight)
    before = gate(x)[2].load
    for step in range(400):
        gate.update_bias(gate(x)[2].load, 0.003 if step < 200 else 0.0003)
    after = gate(x)[2].load
    assert before[0] > 500 and after.max() < 1.3 * 512 / 8
    assert after.sum() == 512  # dropless


def test_bias_update_is_gamma_times_the_sign_and_has_no_gradient(make_tiny_config):
    gate = Gate(config_of(make_tiny_config))
    gate.update_bias(torch.tensor([4.0, 0, 2, 2, 2, 2, 3, 1]), 0.5)
    assert gate.e_score_correction_bias.tolist() == [-0.5, 0.5, 0, 0, 0, 0, -0.5, 0.5]
    assert not gate.e_score_correction_bias.requires_grad
    assert [name for name, _ in gate.named_parameters()] == ["weight"]


def test_the_bias_stays_float32_when_parameters_are_cast(make_tiny_config):
    moe = MoE(config_of(make_tiny_config))
    for parameter in moe.parameters():
        parameter.data = parameter.data.bfloat16()
    moe.gate.update_bias(torch.arange(8.0), 1e-4)
    assert moe.gate.e_score_correction_bias.dtype == torch.float32


def test_balance_loss_in_closed_form(make_tiny_config):
    config = config_of(make_tiny_config, n_group=1, topk_group=1, num_experts_per_tok=2)
    scores = torch.rand(3, 5, 8, dtype=torch.float64)
    expected = 0.0
    for sequence in scores:  # eqs. 17-20, one index at a time
        share = [sum(s[i] / s.sum() for s in sequence) / 5 for i in range(8)]
        chosen = [s.topk(2).indices.tolist() for s in sequence]
        frequency = [8 / (2 * 5) * sum(i in c for c in chosen) for i in range(8)]
        expected += sum(f * p for f, p in zip(frequency, share, strict=True))
    assert Gate(config).balance_loss(scores).item() == pytest.approx(float(expected), rel=1e-12)


def test_balance_loss_sends_gradient_to_the_router_and_none_through_the_counts(make_tiny_config):
    gate = Gate(config_of(make_tiny_config))
    torch.nn.init.normal_(gate.weight)
    _, _, stats = gate(torch.randn(2, 6, 32))
    stats.balance.backward()
    assert gate.weight.grad.norm() > 0 and not stats.load.requires_grad


def loop_over_experts(moe, x):
    """Every token through its experts, one pair at a time."""
    chosen, gates, _ = moe.gate(x)
    flat = x.flatten(0, 1)
    out = torch.zeros_like(flat)
    for token in range(flat.shape[0]):
        for expert, gate in zip(chosen[token].tolist(), gates[token], strict=True):
            w_gate, w_up = moe.experts.gate_up_proj[expert].chunk(2)
            hidden = F.silu(w_gate @ flat[token]) * (w_up @ flat[token])
            out[token] = out[token] + gate * (moe.experts.down_proj[expert] @ hidden)
    return out.view_as(x) + moe.shared_experts(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dispatch_equals_a_loop_over_tokens_and_experts_with_gradients(make_tiny_config, dtype):
    moe = MoE(config_of(make_tiny_config)).to(dtype)
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x = torch.randn(2, 7, 32, dtype=dtype, requires_grad=True)
    weights = torch.randn(2, 7, 32, dtype=dtype)
    # gates are float32 by design only for float32 and below
    tolerance = 1e-5 if dtype == torch.float32 else 1e-6
    inputs = [x, *moe.parameters()]
    got = torch.autograd.grad((moe(x)[0] * weights).sum(), inputs)
    want = torch.autograd.grad((loop_over_experts(moe, x) * weights).sum(), inputs)
    torch.testing.assert_close(moe(x)[0], loop_over_experts(moe, x), rtol=tolerance, atol=tolerance)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=10 * tolerance, atol=10 * tolerance)


def test_an_expert_without_tokens_has_a_zero_gradient_not_none(make_tiny_config):
    moe = MoE(config_of(make_tiny_config))
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter)
    moe.gate.e_score_correction_bias[5] = -100.0
    y, stats = moe(torch.randn(2, 9, 32))
    y.sum().backward()
    assert stats.load[5] == 0
    assert torch.equal(moe.experts.down_proj.grad[5], torch.zeros(32, 16))
    assert torch.isfinite(moe.experts.gate_up_proj.grad).all()


@pytest.mark.parametrize("width", [6, 10])
def test_expert_widths_that_the_grouped_kernel_refuses_still_work(make_tiny_config, width):
    moe = MoE(config_of(make_tiny_config, moe_intermediate_size=width))
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x = torch.randn(2, 7, 32)
    torch.testing.assert_close(moe(x)[0], loop_over_experts(moe, x), rtol=1e-5, atol=1e-5)


def test_the_router_multiplies_in_float32_and_keeps_no_wide_copy_of_the_tokens():
    x, weight = torch.randn(2, 5, 16).bfloat16(), torch.randn(6, 16).bfloat16()
    leaves = [tensor.clone().requires_grad_() for tensor in (x, weight)]
    wide = [tensor.double().requires_grad_() for tensor in (x, weight)]
    logits, exact = router_logits(*leaves), F.linear(*wide)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits.double(), exact, rtol=1e-5, atol=1e-5)
    assert [saved.dtype for saved in logits.grad_fn.saved_tensors] == [torch.bfloat16] * 2
    slope = torch.randn(2, 5, 6)
    grads = torch.autograd.grad(logits, leaves, slope)
    for ours, want in zip(grads, torch.autograd.grad(exact, wide, slope.double()), strict=True):
        assert ours.dtype == torch.bfloat16
        torch.testing.assert_close(ours.double(), want, rtol=2**-8, atol=1e-3)
