"""The Triton kernels against the same operations in float64: on a GPU, or in Triton's interpreter
where Triton is.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from dsv3_mtp.model import attention, layers
from dsv3_mtp.model.causal_lm import DeepseekV3MTP
from dsv3_mtp.ops import experts as dispatch
from dsv3_mtp.ops import fused

pytest.importorskip("triton", reason="triton is not installed; it comes with torch for CUDA")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
interpreted = os.environ.get("TRITON_INTERPRET") == "1"
without_gpu = pytest.mark.skipif(
    not interpreted, reason="needs a CUDA device, or TRITON_INTERPRET=1"
)
pytestmark = pytest.mark.gpu if DEVICE == "cuda" else without_gpu
DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"]
)
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 6e-3}


def test_every_kernel_compiles_for_a_hopper_gpu(tmp_path):
    """Neither the compiler nor the assembler needs a GPU; the interpreter takes what they
    refuse.
    """
    root = Path(__file__).parents[2]
    sources = (
        root / "dsv3_mtp" / name
        for name in ("ops/triton_kernels.py", "precision/triton_quantise.py")
    )
    launched = {
        name
        for source in sources
        for name in re.findall(r"^ +(_\w+)\[", source.read_text(), re.MULTILINE)
    }
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(root), "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, str(root / "tests/compile_kernels.py"), "90"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    assert set(run.stdout.split()) == launched


def check(kernel, reference, *inputs):
    """Runs both; the kernel on DEVICE, the reference in float64 on the CPU. Results of one and the
    other.
    """
    from dsv3_mtp.ops import triton_kernels

    got = getattr(triton_kernels, kernel)(*(x.to(DEVICE) for x in inputs))
    want = reference(*(x.double() if x.is_floating_point() else x for x in inputs))
    got, want = (x if isinstance(x, tuple) else (x,) for x in (got, want))
    for ours, exact in zip(got, want, strict=True):
        assert ours.shape == exact.shape and ours.dtype == inputs[0].dtype
        assert (ours.cpu().double() - exact).norm() <= ROUNDING[ours.dtype] * exact.norm(), kernel


@DTYPES
def test_swiglu_forward_and_backward(dtype):
    for width in (40, 1100):
        gate, up, grad, gates = torch.randn(3, 7, width).to(dtype).unbind() + (
            torch.rand(7).to(dtype),
        )
        check("silu_mul", layers.silu_mul, gate, up)
        check("silu_mul_backward", layers.silu_mul_backward, grad, gate, up)
        gate_up = torch.cat([gate, up], 1)
        check("swiglu", dispatch.swiglu, gate_up, gates)
        check("swiglu_backward", dispatch.swiglu_backward, grad, gate_up, gates)


@DTYPES
@pytest.mark.parametrize("width", [48, 1500])
def test_sums_of_the_rows_of_a_token(dtype, width):
    check(
        "gather_sum",
        lambda x, slots: x[slots].sum(1),
        torch.randn(20, width).to(dtype),
        torch.randint(20, (5, 4)),
    )


@DTYPES
@pytest.mark.parametrize(
    "sizes", [(2, 5, 3, 12, 8, 10), (1, 4, 17, 16, 4, 16), (2, 3, 4, 24, 6, 7)]
)
def test_heads_are_rotated_and_sorted_and_gradients_go_back(dtype, sizes):
    batch, length, heads, nope, rope, value = sizes
    query, kv = (
        torch.randn(batch, length, heads, nope + rope),
        torch.randn(batch, length, heads, nope + value),
    )
    k_rope = torch.randn(batch, length, 20 + rope)[..., 20:]  # a part of a wider row
    inputs = [x.to(dtype) for x in (query, kv, k_rope)]
    angles = torch.randn(2, length, rope // 2)
    grads = [
        torch.randn(batch, length, heads, n).to(dtype) for n in (nope + rope, nope + rope, value)
    ]

    def forward(*tensors):
        return tuple(x.transpose(1, 2) for x in attention.to_heads(*tensors))

    def backward(*tensors):
        exact = [x.double().requires_grad_() for x in inputs]
        return torch.autograd.grad(forward(*exact, tensors[3]), exact, tensors[:3])

    check("to_heads", forward, *inputs, angles)
    check("to_heads_backward", backward, *grads, angles)


@DTYPES
@pytest.mark.parametrize("vocab", [50, 4096, 5000])
def test_cross_entropy(dtype, vocab):
    from dsv3_mtp.ops import triton_kernels

    logits, targets, weight = (
        (3 * torch.randn(6, vocab)).to(dtype),
        torch.randint(vocab, (6,)),
        torch.rand(6),
    )
    exact = logits.double().requires_grad_()
    nll = F.cross_entropy(exact, targets, reduction="none")
    (wanted,) = torch.autograd.grad((nll * weight.double()).sum(), exact)
    grad = logits.clone().to(DEVICE)
    got, prediction = triton_kernels.cross_entropy_(grad, targets.to(DEVICE), weight.to(DEVICE))
    assert (grad.cpu().double() - wanted).norm() <= ROUNDING[dtype] * wanted.norm()
    assert (got.cpu().double() - nll).norm() <= 1e-6 * nll.norm()
    assert torch.equal(prediction.cpu(), logits.float().argmax(-1))
    targets[0] = vocab
    got = triton_kernels.cross_entropy_(
        logits.clone().to(DEVICE), targets.to(DEVICE), weight.to(DEVICE)
    )[0].cpu()
    # a token outside the vocabulary has no loss
    assert got[0].isnan() and not got[1:].isnan().any()


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
@pytest.mark.parametrize("mode", ["sequential", "parallel"])
def test_a_model_with_the_kernels_has_the_loss_and_gradients_of_one_without(
    make_tiny_config, monkeypatch, mode, checkpointing
):
    layers = {
        "model.num_hidden_layers": 2,
        "mtp.num_nextn_predict_layers": 2,
    }  # one dense, one with experts
    config = make_tiny_config(layers | {"mtp.mode": mode})
    model = DeepseekV3MTP(config.model, config.mtp)
    model.init_weights(0)
    model.to(DEVICE).checkpoint_activations(checkpointing)
    tokens = torch.randint(64, (2, 3 + 1 + model.depths)).to(DEVICE)
    results = []
    for on in (False, True):
        if on and DEVICE == "cuda":
            assert fused.enable() == "Triton kernels between the products"
        elif on:
            from dsv3_mtp.ops import triton_kernels

            monkeypatch.setattr(fused, "kernels", triton_kernels)
            monkeypatch.setattr(fused, "usable", lambda x: x.dtype == torch.float32)
        out = model(tokens, balance_loss_weight=1e-4)
        results.append(
            [out.loss, out.nll_sum, *torch.autograd.grad(out.loss, list(model.parameters()))]
        )
    fused.disable()
    for plain, ours in zip(*results, strict=True):
        assert (ours - plain).norm() <= 1e-5 * plain.norm() + 1e-9
