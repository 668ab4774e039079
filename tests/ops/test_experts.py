"""Dispatch to the routed experts: its hand-written backward, empty experts, padding, and both kinds
of products.
"""

from contextlib import nullcontext

import pytest
import torch

from dsv3_mtp.ops import choice
from dsv3_mtp.ops import experts as dispatch
from dsv3_mtp.ops.experts import (
    from_experts,
    gather_sum,
    grouped,
    grouped_input_grad,
    grouped_weight_grad,
    routed,
    sort_by_expert,
    spread,
    to_experts,
)
from dsv3_mtp.ops.swiglu import gated_swiglu


def inputs(tokens=6, experts=5, top_k=2, hidden=4, width=3, dtype=torch.float64):
    x = torch.randn(tokens, hidden, dtype=dtype, requires_grad=True)
    gates = torch.rand(tokens, top_k, dtype=dtype, requires_grad=True)
    gate_up = torch.randn(experts, 2 * width, hidden, dtype=dtype, requires_grad=True)
    down = torch.randn(experts, hidden, width, dtype=dtype, requires_grad=True)
    # the last expert gets nothing
    chosen = torch.stack([torch.randperm(experts - 1)[:top_k] for _ in range(tokens)])
    return x, gates, gate_up, down, chosen, torch.bincount(chosen.flatten(), minlength=experts)


def plain(x, gates, gate_up, down, chosen):
    """One expert of one token at a time, differentiated by torch."""
    rows = []
    for token in range(len(x)):
        parts = []
        for factor, expert in zip(gates[token], chosen[token].tolist(), strict=True):
            gate, up = (gate_up[expert] @ x[token]).chunk(2)
            parts.append(factor * (down[expert] @ (torch.nn.functional.silu(gate) * up)))
        rows.append(torch.stack(parts).sum(0))
    return torch.stack(rows)


def test_the_backward_passes_gradcheck():
    x, gates, gate_up, down, chosen, counts = inputs()
    assert torch.autograd.gradcheck(
        lambda *args: routed(*args, chosen, counts), (x, gates, gate_up, down)
    )


@pytest.mark.parametrize("multiple", [1, 4, 64])
def test_values_and_gradients_equal_the_plain_path_whatever_the_padding(monkeypatch, multiple):
    monkeypatch.setattr(dispatch, "padding", lambda x: multiple)
    *leaves, chosen, counts = inputs(tokens=23)
    got, want = routed(*leaves, chosen, counts), plain(*leaves, chosen)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    cotangent = torch.randn_like(want)
    grads = [torch.autograd.grad(y, leaves, cotangent) for y in (got, want)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("multiple", [1, 8])
def test_the_steps_one_by_one_equal_the_plain_path_and_padding_is_zeros_both_ways(multiple):
    *leaves, chosen, counts = inputs(tokens=23)
    x, gates, gate_up, down = leaves
    padded = -(-counts // multiple) * multiple
    layout = sort_by_expert(chosen, gates, counts, multiple, int(padded.sum()))
    rows = to_experts(x, layout)
    parts = zip(rows.split(padded.tolist()), gate_up, strict=True)
    hidden = gated_swiglu(torch.cat([part @ matrix.T for part, matrix in parts]), layout.gates)
    y = torch.cat(
        [part @ matrix.T for part, matrix in zip(hidden.split(padded.tolist()), down, strict=True)]
    )
    got, want = from_experts(y, layout), plain(*leaves, chosen)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    cotangent = torch.randn_like(want)
    grads = [torch.autograd.grad(z, leaves, cotangent, retain_graph=True) for z in (got, want)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)
    padding = torch.ones(len(rows), dtype=torch.bool)
    padding[layout.slots.flatten()] = False
    assert padding.sum() == padded.sum() - 46
    (grad_y,) = torch.autograd.grad(got, y, cotangent)
    assert not rows[padding].any() and not grad_y[padding].any()
    assert grad_y[~padding].any(1).all()


def test_padded_rows_are_whole_multiples_with_gate_zero():
    *_, chosen, counts = inputs(tokens=30)
    layout = sort_by_expert(chosen, torch.ones(30, 2), counts, 8)
    assert (layout.counts % 8 == 0).all() and (layout.counts >= counts).all()
    assert layout.gates.sum() == 60 and layout.counts.sum() == len(layout.source)
    expert_of_row = torch.repeat_interleave(torch.arange(5), layout.counts)
    assert torch.equal(expert_of_row[layout.slots], chosen)
    assert torch.equal(layout.source[layout.slots], torch.arange(30)[:, None].expand(30, 2))


def test_rows_are_padded_only_where_onednn_multiplies():
    x = torch.zeros(1)
    assert dispatch.padding(x) == 1 and dispatch.padding(x.bfloat16()) == dispatch.MULTIPLE
    torch.set_float32_matmul_precision("medium")
    try:
        assert dispatch.padding(x) == dispatch.MULTIPLE
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_for_all_experts_equals_one_product_per_expert(dtype):
    counts = torch.tensor([0, 10, 0, 14, 0])
    x, grad = torch.randn(24, 16, dtype=dtype), torch.randn(24, 32, dtype=dtype)
    weight = torch.randn(5, 32, 16, dtype=dtype)
    tolerance = (
        {"rtol": 1e-2, "atol": 1e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    )
    for product, left, right in (
        (grouped, x, weight),
        (grouped_input_grad, grad, weight),
        (grouped_weight_grad, grad, x),
    ):
        torch.testing.assert_close(
            product(left, right, counts), product(left, right, counts.tolist()), **tolerance
        )


def test_a_frozen_expert_weight_costs_no_product(monkeypatch):
    *leaves, chosen, counts = inputs()
    x, gates, gate_up, down = (leaf.detach() for leaf in leaves)
    monkeypatch.setattr(dispatch, "grouped_weight_grad", None)
    x.requires_grad_()
    routed(x, gates, gate_up, down, chosen, counts).sum().backward()
    assert x.grad is not None


def test_bfloat16_stays_within_its_rounding_of_float64():
    *leaves, chosen, counts = inputs(tokens=64, hidden=16, width=8)
    low = [leaf.detach().bfloat16().requires_grad_() for leaf in leaves]
    wide = [leaf.detach().double().requires_grad_() for leaf in low]
    cotangent = torch.randn(64, 16, dtype=torch.float64)
    got = torch.autograd.grad(routed(*low, chosen, counts), low, cotangent.bfloat16())
    want = torch.autograd.grad(plain(*wide, chosen), wide, cotangent.bfloat16().double())
    for a, b in zip(got, want, strict=True):
        assert (a.double() - b).norm() < 1e-2 * b.norm()


@pytest.mark.parametrize("plain", [True, False], ids=["torch", "C"])
def test_rows_are_spread_and_summed_where_some_are_missing(compiled, plain):
    source, slots = torch.tensor([2, 0, 2]), torch.tensor([[1, -1], [-1, -1], [2, 0]])
    x, rows = torch.randn(3, 20, requires_grad=True), torch.randn(3, 20, requires_grad=True)
    with choice.plain() if plain else nullcontext():
        there, back = spread(x, source, slots), gather_sum(rows, source, slots)
        (grad_x,) = torch.autograd.grad(there, x, rows.detach())
        (grad_rows,) = torch.autograd.grad(back, rows, x.detach())
    assert torch.equal(there, x[source]) and torch.equal(grad_rows, x[source])
    expected = torch.zeros(3, 20).index_add(0, source, rows)
    torch.testing.assert_close(back, expected)
    torch.testing.assert_close(grad_x, expected)


def test_an_expert_without_rows_has_no_gradient_where_the_kernel_leaves_memory(monkeypatch):
    """Blackwell (pytorch#172439): the grouped product leaves empty groups as they were."""
    grouped_mm = torch.nn.functional.grouped_mm

    def on_blackwell(a, b, *, offs):
        out = grouped_mm(a, b, offs=offs)
        if out.ndim == 3:
            out[torch.diff(offs, prepend=offs.new_zeros(1)) == 0] = float("nan")
        return out

    monkeypatch.setattr(torch.nn.functional, "grouped_mm", on_blackwell)
    counts = torch.tensor([0, 10, 0, 14])
    x, grad = torch.randn(24, 16).bfloat16(), torch.randn(24, 32).bfloat16()
    assert grouped_weight_grad(grad, x, counts)[0].isnan().all()  # what the guard is for
    monkeypatch.setattr(dispatch, "leaves_empty_groups", lambda device: True)
    found = grouped_weight_grad(grad, x, counts)
    assert not found[0].any() and not found[2].any() and not found.isnan().any()
    assert found[1].any() and found[3].any()
