"""Chunked cross-entropy against the full logits, in float64."""

import weakref

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from dsv3_mtp.ops import cross_entropy as losses
from dsv3_mtp.ops.cross_entropy import linear_cross_entropy


def inputs(rows=37, hidden=8, vocab=19, dtype=torch.float64):
    h = torch.randn(rows, hidden, dtype=dtype, requires_grad=True)
    w = torch.randn(vocab, hidden, dtype=dtype, requires_grad=True)
    row_weight = torch.rand(rows, dtype=dtype)
    row_weight[::5] = 0
    return h, w, torch.randint(vocab, (rows,)), row_weight


def full(h, w, targets, row_weight):
    logits = h @ w.T
    nll = F.cross_entropy(logits, targets, reduction="none")
    return (nll * row_weight).sum(), nll, logits.argmax(-1)


@pytest.mark.parametrize("chunk_rows", [1, 5, 37, 1000])
def test_values_and_gradients_equal_the_full_cross_entropy(monkeypatch, chunk_rows):
    monkeypatch.setattr(losses, "CHUNK_ELEMENTS", chunk_rows * 19)
    h, w, targets, row_weight = inputs()
    loss, nll, prediction = linear_cross_entropy(h, w, targets, row_weight)
    grads = torch.autograd.grad(3 * loss, (h, w))
    expected, expected_nll, expected_prediction = full(h, w, targets, row_weight)
    expected_grads = torch.autograd.grad(3 * expected, (h, w))
    torch.testing.assert_close(loss, expected, rtol=1e-13, atol=0)
    torch.testing.assert_close(nll, expected_nll, rtol=1e-12, atol=1e-13)
    assert torch.equal(prediction, expected_prediction)
    for got, want in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(("vocab", "rows"), [(129280, 4096), (102400, 4096), (2048, 65536)])
def test_a_gpus_chunks_are_whole_tiles_and_no_fewer_than_its_products_want(vocab, rows):
    assert losses.chunk_rows(vocab, on_gpu=True) == rows
    assert losses.chunk_rows(vocab, on_gpu=False) == 2**24 // vocab  # 64 MiB in float32


def test_without_gradients_only_the_logits_are_computed():
    h, w, targets, row_weight = inputs()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        linear_cross_entropy(h, w, targets, row_weight)
    assert counter.get_total_flops() == 2 * 37 * 8 * 19


def test_rows_of_weight_zero_send_no_gradient():
    h, w, targets, row_weight = inputs()
    grad_h, grad_w = torch.autograd.grad(linear_cross_entropy(h, w, targets, row_weight)[0], (h, w))
    assert torch.equal(grad_h[::5], torch.zeros_like(grad_h[::5]))
    keep = row_weight > 0
    (only,) = torch.autograd.grad(
        linear_cross_entropy(h[keep], w, targets[keep], row_weight[keep])[0], (w,)
    )
    torch.testing.assert_close(grad_w, only, rtol=1e-12, atol=1e-14)


def test_a_detached_weight_gets_no_gradient_and_the_hidden_states_still_do():
    h, w, targets, row_weight = inputs()
    loss, _, _ = linear_cross_entropy(h, w.detach(), targets, row_weight)
    loss.backward()
    assert w.grad is None
    expected = torch.autograd.grad(full(h, w, targets, row_weight)[0], h)[0]
    torch.testing.assert_close(h.grad, expected, rtol=1e-12, atol=1e-13)


def test_a_second_backward_fails_instead_of_returning_a_wrong_gradient():
    h, w, targets, row_weight = inputs()
    loss, _, _ = linear_cross_entropy(h, w, targets, row_weight)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="used up by the first backward"):
        loss.backward()


def test_bfloat16_stays_within_its_rounding_of_float64(monkeypatch):
    monkeypatch.setattr(losses, "CHUNK_ELEMENTS", 64 * 50)
    h, w, targets, _ = inputs(rows=256, hidden=32, vocab=50)
    row_weight = torch.full((256,), 1 / 256, dtype=torch.float64)
    expected = full(h, w, targets, row_weight)[0]
    expected_grads = torch.autograd.grad(expected, (h, w))
    low_h, low_w = (x.detach().bfloat16().requires_grad_() for x in (h, w))
    loss = linear_cross_entropy(low_h, low_w, targets, row_weight.float())[0]
    assert loss.dtype == torch.float32
    loss.backward()
    assert abs(loss.item() / expected.item() - 1) < 5e-3
    for got, want in zip((low_h.grad, low_w.grad), expected_grads, strict=True):
        assert (got.double() - want).norm() / want.norm() < 2e-2


def test_the_logits_exist_one_chunk_at_a_time(monkeypatch):
    monkeypatch.setattr(losses, "CHUNK_ELEMENTS", 4 * 19)
    chunks = []
    original = losses._cross_entropy

    def watched(logits, *args):
        chunks.append(weakref.ref(logits))
        assert [chunk() is None for chunk in chunks] == [True] * (len(chunks) - 1) + [False]
        assert logits.shape[0] <= 4
        return original(logits, *args)

    monkeypatch.setattr(losses, "_cross_entropy", watched)
    linear_cross_entropy(*inputs(rows=37))
    assert len(chunks) == 10
