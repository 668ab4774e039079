"""The Triton kernel in Triton's interpreter, where Triton is and no GPU; on one
tests/gpu/test_quantise.py runs it.
"""

import math
import os

import numpy as np
import pytest
import torch

from dsv3_mtp.precision.quantise import BLOCK, ROW, by_operations, dequantise, scale_shape
from tests.precision.test_quantise import SHAPES, samples

interpreter = pytest.importorskip("triton.runtime.interpreter", reason="triton is not installed")
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1"
)


@pytest.fixture(autouse=True)
def conversions_of_gpus(monkeypatch):
    """The interpreter's own round halves up, not to even, and lose bfloat16's smallest numbers."""
    import triton.language as tl

    plain = interpreter._convert_float

    def convert(numbers, source, target, mode):
        numbers = np.ascontiguousarray(numbers)
        if target == tl.float8e4nv:
            return torch.from_numpy(numbers).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
        if (source, target) == (tl.float32, tl.bfloat16):
            values = torch.from_numpy(numbers.view(np.float32))
            return values.bfloat16().view(torch.int16).numpy().view(np.uint16)
        if (source, target) == (tl.bfloat16, tl.float32):
            return numbers.view(np.uint16).astype(np.uint32) << 16
        return plain(numbers, source, target, mode)  # the zeros that masked loads give

    monkeypatch.setattr(interpreter, "_convert_float", convert)


def same(x, tile, scale):
    from dsv3_mtp.precision import triton_quantise

    (codes, scale_inv), (want, want_scale) = (
        triton_quantise.quantise(x, tile, scale),
        by_operations(x, tile, scale),
    )
    assert codes.shape == want.shape and codes.is_contiguous()
    assert torch.equal(scale_inv, want_scale)
    assert torch.equal(codes.view(torch.uint8), want.contiguous().view(torch.uint8))


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
@pytest.mark.parametrize(
    ("tile", "scale", "dtype"),
    [
        *((tile, scale, torch.bfloat16) for tile in (ROW, BLOCK) for scale in ("pow2", "fp32")),
        (ROW, "pow2", torch.float32),
        (BLOCK, "fp32", torch.float16),
    ],
)
def test_codes_and_scales_are_those_of_torchs_operations_bit_for_bit(tile, scale, dtype):
    kinds = [
        (kind, (7, 130)) for kind in ("normal", "zeros", "outliers", "tiny", "infinite", "nan")
    ]
    for kind, shape in kinds + [("wide", shape) for shape in SHAPES]:
        x = samples(kind, shape, dtype)
        if kind == "nan":
            x.view(-1)[x.numel() // 2] = math.nan
        same(x, tile, scale)
        same(x.t(), tile, scale)
    x = samples("wide", (300, 400), dtype)
    same(x[::2, 3:200:3], tile, scale)
    same(x[:1, :1].expand(130, 140), tile, scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_numbers_are_those_of_torchs_operations_bit_for_bit(dtype):
    from dsv3_mtp.precision import triton_quantise

    for shape in ((1, 1), (130, 257), (256, 128)):
        codes = torch.randint(0, 256, (3, *shape), dtype=torch.uint8)
        codes.view(-1)[: min(256, codes.numel())] = torch.arange(256).byte()[: codes.numel()]
        scales = torch.rand(3, *scale_shape(shape)) * 2.0 ** torch.randint(-12, 7, (3, 1, 1))
        found = triton_quantise.dequantise(codes, scales, dtype)
        for ours, matrix, blocks in zip(found, codes, scales, strict=True):
            wanted = dequantise(matrix.view(torch.float8_e4m3fn), blocks, BLOCK).to(dtype)
            torch.testing.assert_close(ours, wanted, rtol=0, atol=0, equal_nan=True)
    with pytest.raises(ValueError, match=r"must be of shape \(3, 2, 1\) \(got \(3, 1, 1\)\)"):
        triton_quantise.dequantise(codes, scales[:, :1], dtype)
