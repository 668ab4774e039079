"""FP8 products and attention kernels on a GPU, against the formulae and float64."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from dsv3_mtp.config import FP8Config
from dsv3_mtp.model.causal_lm import DeepseekV3MTP, meta_model
from dsv3_mtp.model.output import LossSettings
from dsv3_mtp.model.targets import document_starts
from dsv3_mtp.ops.attention import sdpa
from dsv3_mtp.ops.compute import building
from dsv3_mtp.ops.cores import choose_attention
from dsv3_mtp.precision import te
from dsv3_mtp.precision.convert import UNSUPPORTED, fp8_compute
from dsv3_mtp.precision.emulate import Emulated
from dsv3_mtp.precision.hopper import ScaledMM
from dsv3_mtp.precision.linear import FP8Linear, Recipe
from dsv3_mtp.precision.quantise import BLOCK, ROW, quantise
from tests.gpu.test_model import CUDA, WIDE, deterministic, on, relative
from tests.precision.test_linear import rounded
from tests.precision.test_quantise import samples

PRODUCTS = {"torch": ScaledMM, "emulate": Emulated}
BACKENDS = ["te", "torch", "emulate"]
# An output in bfloat16 is off by 2^-9 at most, 1.2e-3 in the mean; tensor cores that keep 14 bits
# add 1e-4.
ROUNDING = 2.5e-3


def needs(backend: str) -> None:
    if reason := UNSUPPORTED[backend](CUDA):
        pytest.skip(f"fp8.backend: {backend} {reason}")


@pytest.mark.parametrize("tile", [ROW, BLOCK], ids=["row", "block"])
@pytest.mark.parametrize("scale", ["pow2", "fp32"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", ["normal", "zeros", "outliers", "wide", "tiny", "infinite"])
def test_codes_and_scales_are_those_of_transformer_engine_bit_for_bit(kind, dtype, scale, tile):
    needs("te")
    for shape in ((128, 128), (256, 512), (1000, 576), (136, 272)):
        x = samples(kind, shape, dtype).to(CUDA)
        codes, scale_inv = quantise(x, tile, scale)
        their_codes, their_scale = te.quantise(x, tile, scale)
        assert torch.equal(scale_inv, their_scale[: scale_inv.shape[0], : scale_inv.shape[1]]), (
            shape
        )
        assert torch.equal(codes.view(torch.uint8), their_codes), shape


@pytest.mark.parametrize("scale", ["pow2", "fp32"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_layer_computes_the_products_of_the_rounded_operands(backend, scale):
    needs(backend)
    for tokens, inputs, outputs in ((512, 512, 512), (1000, 1024, 576), (40, 256, 160)):
        x = torch.randn(tokens, inputs, device=CUDA, dtype=torch.bfloat16, requires_grad=True)
        grad = torch.randn(tokens, outputs, device=CUDA, dtype=torch.bfloat16)
        layer = (
            te.TELinear(inputs, outputs, scale)
            if backend == "te"
            else FP8Linear(inputs, outputs, Recipe(PRODUCTS[backend](scale)))
        ).to(CUDA, torch.bfloat16)
        assert [name for name, _ in layer.named_parameters()] == ["weight"]
        y = layer(x.view(2, tokens // 2, inputs)).view(tokens, outputs)
        y.backward(grad)
        with torch.no_grad():
            weight = rounded(layer.weight, BLOCK, scale).double()
            assert relative(y, rounded(x, ROW, scale).double() @ weight.T) < ROUNDING
            assert relative(x.grad, rounded(grad, ROW, scale).double() @ weight) < ROUNDING
            along_tokens = (
                rounded(grad.T, ROW, scale).double() @ rounded(x.T, ROW, scale).double().T
            )
            assert relative(layer.weight.grad, along_tokens) < ROUNDING
            assert torch.equal(layer(x), y)  # as in evaluation


@pytest.mark.parametrize(
    "counts", [[300, 0, 17, 195], [0, 0, 0, 512], [128, 128, 128, 128], [0, 0, 0, 0]], ids=str
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_grouped_experts_compute_the_products_of_each_ones_rounded_operands(backend, counts):
    needs(backend)
    rows = sum(counts)
    x = torch.randn(rows, 256, device=CUDA, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(4, 160, 256, device=CUDA, dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn(rows, 160, device=CUDA, dtype=torch.bfloat16)
    grouped = (
        te.TEGroupedLinear("pow2")
        if backend == "te"
        else Recipe(PRODUCTS[backend]()).grouped_linear
    )
    for step in range(2):  # gradients add up over micro-batches
        y = grouped(x, weight, counts)
        y.backward(grad)
        assert y.shape == (rows, 160)
        with torch.no_grad():
            parts = zip(
                x.split(counts),
                grad.split(counts),
                x.grad.split(counts),
                y.split(counts),
                strict=True,
            )
            for expert, (a, g, grad_a, out) in enumerate(parts):
                if not len(a):
                    assert not weight.grad[expert].any()
                    continue
                w = rounded(weight[expert], BLOCK).double()
                assert relative(out, rounded(a, ROW).double() @ w.T) < ROUNDING
                assert relative(grad_a, (step + 1) * rounded(g, ROW).double() @ w) < ROUNDING
                along_tokens = rounded(g.T, ROW).double() @ rounded(a.T, ROW).double().T
                assert relative(weight.grad[expert], (step + 1) * along_tokens) < ROUNDING


@pytest.mark.parametrize("mode", ["selective", "full"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_checkpointing_activations_of_an_fp8_model_changes_no_bit(make_tiny_config, backend, mode):
    needs(backend)
    results = []
    for used in ("none", mode):
        config = make_tiny_config(WIDE)
        fp8 = FP8Config(enabled=True, backend=backend)
        make = partial(meta_model, config.model, config.mtp)
        compute, note = fp8_compute(fp8, CUDA, torch.bfloat16, make)
        assert backend in note and "layers" in note
        with building(replace(compute, core=deterministic, recompute=used)):
            model = DeepseekV3MTP(config.model, config.mtp)
        model.init_weights(0)
        tokens = torch.randint(
            64, (2, 17 + model.depths), generator=torch.Generator().manual_seed(1)
        )
        model = on(model, CUDA, torch.bfloat16)  # DeepSpeed casts afterwards
        out = model(tokens.to(CUDA), settings=LossSettings(balance_loss_weight=0.1))
        out.loss.backward()
        results.append({"loss": out.loss} | {name: p.grad for name, p in model.named_parameters()})
    for name, value in results[0].items():
        assert torch.isfinite(value).all(), name
        assert torch.equal(value, results[1][name]), name


@pytest.mark.parametrize("widths", [(192, 128), (96, 64)], ids=str)
@pytest.mark.parametrize("name", ["fa4", "fa3", "fa2", "te", "sdpa"])
def test_an_attention_kernel_is_within_bfloat16_of_float32(name, widths):
    heads, length, scale = 4, 1000, widths[0] ** -0.5
    try:
        core, _ = choose_attention(
            name, heads=heads, widths=widths, dtype=torch.bfloat16, device=CUDA, masked=False
        )
    except ValueError as error:
        assert "does not run here" not in str(error)  # installed, and broken
        pytest.skip(str(error).splitlines()[0])
    inputs = [
        torch.randn(2, heads, length, n, device=CUDA).bfloat16() for n in (widths[0], *widths)
    ]
    grad = torch.randn(2, heads, length, widths[1], device=CUDA).bfloat16()
    results = []
    for function, dtype in ((deterministic, torch.float32), (core, torch.bfloat16)):
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        out = function(*leaves, scale, None)
        assert out.shape == grad.shape and out.dtype == dtype
        results.append([out, *torch.autograd.grad(out, leaves, grad.to(dtype))])
    for part, exact, ours in zip(("out", "dq", "dk", "dv"), *results, strict=True):
        assert relative(ours, exact) < 1e-2, part


@pytest.mark.parametrize("widths", [(192, 128), (96, 64)], ids=str)
def test_sdpa_under_a_document_mask_is_within_bfloat16_of_float32(widths):
    documents = torch.arange(512, device=CUDA).div(150, rounding_mode="floor").expand(2, -1)
    first = document_starts(documents)
    inputs = [torch.randn(2, 4, 512, n, device=CUDA).bfloat16() for n in (widths[0], *widths)]
    results = []
    for function, dtype in ((deterministic, torch.float32), (sdpa, torch.bfloat16)):
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        out = function(*leaves, widths[0] ** -0.5, first)
        results.append([out, *torch.autograd.grad(out, leaves, torch.ones_like(out))])
    for part, exact, ours in zip(("out", "dq", "dk", "dv"), *results, strict=True):
        assert relative(ours, exact) < 1e-2, part
