"""The Triton kernels against the same operations in float64: on a GPU, or in Triton's interpreter
where Triton is.
"""

import os
import re
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from dsv3_mtp.model.causal_lm import DeepseekV3MTP
from dsv3_mtp.model.moe import Gate, count
from dsv3_mtp.model.output import LossSettings
from dsv3_mtp.ops import choice, norm, rotary, swiglu
from dsv3_mtp.ops.compute import Compute, building

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


@pytest.mark.parametrize("capabilities", [["90"], ["80", "100", "120"]], ids=str)
@pytest.mark.slow
def test_every_kernel_compiles_for(capabilities, tmp_path):
    """Neither the compiler nor the assembler needs a GPU; the interpreter takes what they
    refuse.
    """
    root = Path(__file__).parents[2]
    sources = (
        root / "dsv3_mtp" / name
        for name in (
            "ops/triton_kernels.py",
            "ops/triton_norm.py",
            "ops/triton_router.py",
            "precision/triton_grouped.py",
            "precision/triton_quantise.py",
        )
    )
    launched = {
        name
        for source in sources
        for name in re.findall(r"^ +(_\w+)\[", source.read_text(), re.MULTILINE)
    }
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    # the caller's folders stay: packages may be there, triton itself for one
    path = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment |= {"PYTHONPATH": path, "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, str(root / "tests/compile_kernels.py"), *capabilities]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    found = {(capability, name) for capability in capabilities for name in launched}
    no_e4m3 = {("80", "_quantise"), ("80", "_grouped")}  # before Ada: FP8 is emulated there
    assert {tuple(line.split()) for line in run.stdout.splitlines()} == found - no_e4m3


def check(kernel, reference, *inputs):
    """Runs both; the kernel on DEVICE, the reference in float64 on the CPU. Results of one and the
    other.
    """
    from dsv3_mtp.ops import triton_kernels

    got = getattr(triton_kernels, kernel)(*(x if x is None else x.to(DEVICE) for x in inputs))
    want = reference(
        *(x.double() if x is not None and x.is_floating_point() else x for x in inputs)
    )
    got, want = (x if isinstance(x, tuple) else (x,) for x in (got, want))
    got = [x for x in got if x is not None]
    for ours, exact in zip(got, want, strict=True):
        wide = ours.ndim == 1  # a gradient of factors, which are float32
        assert ours.shape == exact.shape
        assert ours.dtype == (torch.float32 if wide else inputs[0].dtype)
        assert (ours.cpu().double() - exact).norm() <= ROUNDING[ours.dtype] * exact.norm(), kernel


@DTYPES
@pytest.mark.parametrize("width", [40, 256, 1100])
def test_swiglu_forward_and_backward(dtype, width):
    def forward(gate, up, factor=None):
        return swiglu.forward(None, gate, up, factor)

    def backward(grad, gate, up, factor=None):
        return swiglu.backward(None, grad, gate, up, factor)

    rows = torch.randn(7, 2 * width).to(dtype)
    gate, up = rows.chunk(2, dim=1)  # parts of wider rows
    grad, factor = torch.randn(7, width).to(dtype), torch.rand(7)
    check("swiglu", forward, gate, up, None)
    check("swiglu", forward, gate.contiguous(), up, factor)
    check("swiglu_backward", lambda *args: backward(*args)[0], grad, gate, up, None)
    check("swiglu_backward", backward, grad, gate, up, factor)


@pytest.mark.parametrize(("width", "dtype"), [(48, torch.float32), (1500, torch.bfloat16)])
def test_sums_of_the_rows_of_a_token(dtype, width):
    rows, slots = torch.randn(20, width).to(dtype), torch.randint(20, (45, 4))
    check("sum_rows", lambda x, slots: x[slots].sum(1), rows, slots)
    check("sum_rows", lambda x, slots: x[slots].sum(1), rows, slots[:0])


@DTYPES
@pytest.mark.parametrize(("rows", "width"), [(5, 40), (601, 24), (3, 1500)])
def test_residual_additions_with_their_norm(monkeypatch, dtype, rows, width):
    """Several rows per program, several turns of the backward's programs, a row of two tiles."""
    monkeypatch.setattr(norm, "LARGE", 0)
    monkeypatch.setattr(triton_norm(), "PROGRAMS", 4)
    if DEVICE == "cpu":  # the interpreter is as good as a GPU
        monkeypatch.setattr(choice, "kernels", lambda *x: interpreter())
    shape = (1, rows, width)
    inputs = [torch.randn(shape), 2 * torch.randn(shape), 1 + torch.randn(width)]
    slopes = [torch.randn(shape).to(dtype) for _ in range(2)]  # of the sum and of its norm
    ours = [x.to(dtype).to(DEVICE).requires_grad_() for x in inputs]
    exact = [x.detach().cpu().double().requires_grad_() for x in ours]
    got = norm.add_rms_norm(*ours, 1e-6)
    total = exact[0] + exact[1]
    wanted = total, F.rms_norm(total, (width,), exact[2], 1e-6)
    assert torch.equal(norm.norm_of_sum(got[0], ours[2], 1e-6), got[1])  # what is made again
    (alone,) = torch.autograd.grad(norm.norm_of_sum(ours[0], ours[2], 1e-6).sum(), ours[0])
    (wanted_alone,) = torch.autograd.grad(
        F.rms_norm(exact[0], (width,), exact[2], 1e-6).sum(), exact[0]
    )
    got = *got, *torch.autograd.grad(got, ours, [x.to(DEVICE) for x in slopes]), alone
    wanted = *wanted, *torch.autograd.grad(wanted, exact, [x.double() for x in slopes])
    for mine, float64 in zip(got, [*wanted, wanted_alone], strict=True):
        assert mine.shape == float64.shape and mine.dtype == dtype
        assert (mine.cpu().double() - float64).norm() <= ROUNDING[dtype] * float64.norm()


def test_a_slot_without_a_row_reads_nothing_and_shows():
    from dsv3_mtp.ops import triton_kernels

    slots = torch.tensor([[0, 1], [2, 10**9], [-2, 0], [-1, 0]]).to(DEVICE)
    got = triton_kernels.sum_rows(torch.ones(3, 16).to(DEVICE), slots).cpu()
    assert (got[0] == 2).all() and got[1:3].isnan().all()
    assert (got[3] == 1).all()  # -1 is no row


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
        return tuple(x.transpose(1, 2) for x in rotary.to_heads(*tensors))

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


ROUTERS = [
    (8, {"n_group": 1, "topk_group": 1, "num_experts_per_tok": 2}),
    (24, {"n_group": 4, "topk_group": 2, "num_experts_per_tok": 6}),
    (9, {"n_group": 3, "topk_group": 3, "num_experts_per_tok": 3, "norm_topk_prob": False}),
    (256, {"n_group": 8, "topk_group": 4, "num_experts_per_tok": 8}),
]


@pytest.mark.parametrize(("experts", "settings"), ROUTERS, ids=lambda x: str(x)[:9])
def test_the_router_chooses_weighs_and_counts_as_torchs_operations(
    make_tiny_config, experts, settings
):
    from dsv3_mtp.ops import triton_kernels

    shape = {"n_routed_experts": experts, "norm_topk_prob": True, "routed_scaling_factor": 2.5}
    config = make_tiny_config({f"model.{k}": v for k, v in (shape | settings).items()}).model
    gate = Gate(config)
    gate.e_score_correction_bias.normal_(std=0.2)
    gate.to(DEVICE)
    logits = torch.randn(2, 19, experts, device=DEVICE, requires_grad=True)
    exact = logits.detach().double().requires_grad_()
    chosen, gates, stats = gate.by_kernel(triton_kernels.route, logits)
    scores = exact.sigmoid()
    flat = scores.flatten(0, 1)
    wanted = gate.choose(flat.detach())
    assert torch.equal(chosen.sort(1).values, wanted.sort(1).values)
    assert (
        chosen.gather(1, (flat + gate.e_score_correction_bias).gather(1, chosen).argsort(1))
        == chosen.flip(1)
    ).all()  # the best first
    exact_gates, balance = gate.weigh(flat, chosen), gate.balance_loss(scores)
    torch.testing.assert_close(gates.double(), exact_gates, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(stats.balance.double(), balance, rtol=1e-5, atol=0)
    assert torch.equal(stats.load, count(wanted, experts).float())
    assert stats.nodes == gate.count_nodes(wanted)
    slope = torch.randn_like(gates)
    (ours,) = torch.autograd.grad((gates * slope).sum() + 3 * stats.balance, logits)
    (want,) = torch.autograd.grad((exact_gates * slope).sum() + 3 * balance, exact)
    torch.testing.assert_close(ours.double(), want, rtol=1e-4, atol=1e-6)
    logits = torch.full_like(logits, float("nan"))
    chosen = gate.by_kernel(triton_kernels.route, logits)[0]
    assert all(len(set(row)) == len(row) and max(row) < experts for row in chosen.tolist())


def triton_norm():
    from dsv3_mtp.ops import triton_norm as module

    return module


def interpreter():
    from dsv3_mtp.ops import triton_kernels

    return triton_kernels


@pytest.mark.parametrize(
    ("mode", "checkpointing"),
    [
        ("sequential", "full"),
        ("parallel", "selective"),
        *(pytest.param("sequential", how, marks=pytest.mark.slow) for how in ("none", "selective")),
        *(pytest.param("parallel", how, marks=pytest.mark.slow) for how in ("none", "full")),
    ],
)
def test_a_model_with_the_kernels_has_the_loss_and_gradients_of_one_without(
    make_tiny_config, monkeypatch, mode, checkpointing
):
    monkeypatch.setattr(norm, "LARGE", 0)
    layers = {
        "model.num_hidden_layers": 2,
        "mtp.num_nextn_predict_layers": 2,
    }  # one dense, one with experts
    config = make_tiny_config(layers | {"mtp.mode": mode})
    with building(Compute(recompute=checkpointing)):
        model = DeepseekV3MTP(config.model, config.mtp)
    model.init_weights(0)
    model.to(DEVICE)
    tokens = torch.randint(64, (2, 3 + 1 + model.depths)).to(DEVICE)
    results = []
    if DEVICE == "cuda":
        assert choice.describe(torch.device("cuda")) == "Triton kernels between the products"
    for plain in (True, False):
        with choice.plain() if plain else nullcontext(), monkeypatch.context() as patch:
            if DEVICE == "cpu":  # the interpreter is as good as a GPU
                patch.setattr(
                    choice, "kernels", lambda *x, on=not plain: interpreter() if on else None
                )
            out = model(tokens, settings=LossSettings(balance_loss_weight=1e-4))
            grads = torch.autograd.grad(out.loss, list(model.parameters()))
        results.append([out.loss, out.nll_sum, *grads])
    for plain, ours in zip(*results, strict=True):
        assert (ours - plain).norm() <= 1e-5 * plain.norm() + 1e-9
