"""The C kernels against torch's operations in float64, and what happens where they cannot be built."""

import pytest
import torch
import torch.nn.functional as F

from dsv3_mtp import kernels
from dsv3_mtp.losses import linear_cross_entropy
from dsv3_mtp.model.attention import MLA
from dsv3_mtp.model.causal_lm import DeepseekV3MTP
from dsv3_mtp.model.layers import MLP, RMSNorm, rotary_angles


@pytest.fixture
def compiled():
    note = kernels.enable()
    if "not built" in note:
        pytest.skip(note)
    yield
    kernels.disable()


def in_float64_and_in_kernels(module, x, call):
    """(output, gradient of x, gradients of the parameters) of both, for the same random cotangent."""
    results = []
    for dtype in (torch.float64, torch.float32):
        copy = module.to(dtype)
        inputs = x.detach().to(dtype).requires_grad_()
        y = call(copy, inputs)
        cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        results.append([y, *torch.autograd.grad(y, [inputs, *copy.parameters()], cotangent.to(dtype))])
    return results


def assert_close(results, tolerance=2e-6):
    for expected, got in zip(*results, strict=True):
        assert got.dtype == torch.float32
        assert (got.double() - expected).norm() <= tolerance * expected.norm() + 1e-12


@pytest.mark.parametrize("shape", [(2, 3, 16), (40, 37), (1, 1, 5)])
def test_rmsnorm(compiled, shape):
    norm = RMSNorm(shape[-1], 1e-6)
    norm.weight.data = torch.rand(shape[-1])
    assert_close(in_float64_and_in_kernels(norm, torch.randn(shape), lambda module, x: module(x)))


def test_rmsnorm_of_a_part_of_a_wider_row(compiled):
    norm = RMSNorm(10, 1e-6)
    assert_close(in_float64_and_in_kernels(norm, torch.randn(2, 5, 14), lambda module, x: module(x[..., :10])))


def test_swiglu_feed_forward(compiled):
    mlp = MLP(12, 20)
    x = 4 * torch.randn(2, 7, 12)
    assert_close(in_float64_and_in_kernels(mlp, x, lambda module, x: module(x)))


def test_large_and_small_inputs_of_swiglu_neither_overflow_nor_vanish(compiled):
    gate = torch.tensor([-200.0, -90.0, -1e-3, 0.0, 1e-3, 90.0, 200.0])
    torch.testing.assert_close(kernels.swiglu(gate[None], torch.ones(1, 7))[0], F.silu(gate), rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize("length", [1, 7, 128, 150, 300])
def test_attention_of_any_length_with_gradients(compiled, make_tiny_config, length):
    config = make_tiny_config({"model.max_position_embeddings": 300}).model
    mla = MLA(config)
    angles = rotary_angles(config, torch.arange(length))
    x = torch.randn(2, length, config.hidden_size)
    assert_close(in_float64_and_in_kernels(mla, x, lambda module, x: module(x, angles.to(x.dtype), None)))


def test_cross_entropy(compiled):
    hidden, targets, row_weight = torch.randn(37, 8), torch.randint(19, (37,)), torch.rand(37)
    head = torch.nn.Linear(8, 19, bias=False)
    extra = []

    def loss(module, x):
        value, *rest = linear_cross_entropy(x, module.weight, targets, row_weight)
        extra.append(rest)
        return value

    assert_close(in_float64_and_in_kernels(head, hidden, loss))
    (nll, prediction), (own_nll, own_prediction) = extra
    torch.testing.assert_close(own_nll.double(), nll)
    assert torch.equal(own_prediction, prediction)


def test_cross_entropy_of_equal_logits_predicts_the_first_and_nan_stays_nan(compiled):
    logits = torch.zeros(2, 9)
    logits[1, 4] = torch.nan
    nll, prediction = kernels.cross_entropy_(logits, torch.tensor([3, 3]), torch.ones(2))
    assert kernels.cross_entropy_(torch.zeros(1, 9), torch.tensor([9]), torch.ones(1))[0].isnan()  # no such token
    assert prediction[0] == 0 and 0 <= prediction[1] < 9
    assert nll[0].item() == pytest.approx(2.1972246) and nll[1].isnan()
    assert logits[1].isnan().any()


@pytest.mark.parametrize("mode", ["sequential", "parallel"])
def test_the_whole_model_gives_the_loss_and_gradients_of_the_plain_one(compiled, make_tiny_config, mode):
    config = make_tiny_config({"mtp.mode": mode, "mtp.num_nextn_predict_layers": 2})
    model = DeepseekV3MTP(config.model, config.mtp)
    model.init_weights(0)
    tokens = torch.randint(64, (3, 16 + 3))
    results = []
    for on in (True, False):
        if not on:
            kernels.disable()
        out = model(tokens, balance_loss_weight=0.01)
        results.append([out.loss, *torch.autograd.grad(out.loss, list(model.parameters()))])
    for got, expected in zip(*results, strict=True):
        assert (got - expected).norm() <= 2e-5 * expected.norm()


def test_any_number_of_threads_gives_the_same_bits(compiled):
    x, weight = torch.randn(1000, 33), torch.rand(33)
    _, scale = kernels.rms_norm(x, weight, 1e-6)
    one = kernels.rms_norm_backward(x, x, weight, scale)
    torch.set_num_threads(2)
    assert all(map(torch.equal, one, kernels.rms_norm_backward(x, x, weight, scale)))


def test_without_a_compiler_the_model_runs_on_torchs_operations_and_says_so(monkeypatch, tmp_path):
    monkeypatch.setenv("CC", "no-such-compiler")
    assert kernels.enable() == (
        "C kernels: not built, torch's operations run instead (there is no C compiler; install one, or name it in CC)"
    )
    assert not kernels.usable(torch.zeros(1))


def test_a_failed_build_leaves_nothing_behind(monkeypatch, tmp_path):
    failing = tmp_path / "cc"
    failing.write_text("#!/bin/sh\necho 'no space left' >&2; exit 1\n")
    failing.chmod(0o755)
    monkeypatch.setenv("CC", str(failing))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert kernels.enable().endswith("run instead (no space left)")
    assert list((tmp_path / "cache" / "dsv3_mtp").iterdir()) == []
