"""What FP8's Triton quantiser gives on a GPU: the bytes of the CPU."""

import math

import pytest
import torch

from dsv3_mtp.precision.quantise import BLOCK, ROW, dequantise, no_kernel, quantise, scale_shape
from dsv3_mtp.precision.stored import numbers
from tests.precision.test_quantise import samples


@pytest.mark.parametrize("tile", [ROW, BLOCK], ids=["row", "block"])
@pytest.mark.parametrize("scale", ["pow2", "fp32"])
def test_the_triton_quantiser_is_bit_for_bit_that_of_the_cpu(tile, scale):
    assert no_kernel() is None
    for kind in ("normal", "zeros", "outliers", "tiny", "wide", "infinite", "nan"):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for shape in ((256, 384), (129, 257), (384, 130), (1, 1)):
                x = samples(kind, shape, dtype)
                if kind == "nan":
                    x.view(-1)[x.numel() // 2] = math.nan
                for turned in (x, x.t()):
                    codes, scale_inv = quantise(turned.cuda(), tile, scale)
                    want, want_scale = quantise(turned, tile, scale)
                    assert codes.is_contiguous()
                    assert torch.equal(
                        codes.cpu().view(torch.uint8), want.contiguous().view(torch.uint8)
                    ), (kind, dtype)
                    assert torch.equal(scale_inv.cpu(), want_scale), (kind, dtype, turned.shape)
                    values = dequantise(codes, scale_inv, tile)
                    assert torch.equal(
                        values.cpu().isnan(), dequantise(want, want_scale, tile).isnan()
                    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_numbers_of_codes_are_those_of_the_cpu(dtype):
    """Of matrices, and of experts whose gate and up have blocks of their own."""
    for shape, blocks in (
        ((300, 257), scale_shape((300, 257))),
        ((4, 272, 150), (4, 2, *scale_shape((136, 150)))),
    ):
        codes = torch.randint(0, 256, shape, dtype=torch.uint8)
        scales = torch.rand(blocks) * 2.0 ** torch.randint(-20, 7, blocks)
        found = numbers(codes.cuda(), scales.cuda(), dtype).cpu()
        wanted = numbers(codes, scales, dtype)
        torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)
