"""What FP8's Triton quantiser gives on a GPU: the bytes of the CPU."""

import math

import pytest
import torch

from dsv3_mtp.precision.quantise import BLOCK, ROW, dequantise, no_kernel, quantise
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
