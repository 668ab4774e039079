"""Products of weights in int8 (csrc/codes.h), which drafts are made with."""

import pytest
import torch

from dsv3_mtp.ops import c_library
from dsv3_mtp.ops.c_decode import Linear
from dsv3_mtp.ops.c_layer import WIDEST

SHAPES = [(1, 1), (5, 3), (16, 4), (17, 33), (48, 128), (300, 513)]  # outputs, width
# None: whatever this processor has; then without the instructions that have a way of their own
BUILDS = [None, "-mno-avx512vnni -mno-avx512bf16", "-mno-avx512f"]


@pytest.fixture(params=BUILDS, ids=str)
def built(request, compiled, monkeypatch):
    """The library that the compiler makes with these flags."""
    if request.param:
        monkeypatch.setenv("CC", f"gcc {request.param}")
    for cached in (c_library._library, c_library.function):
        cached.cache_clear()
    if (reason := c_library.unavailable(torch.float32)) is not None:
        pytest.skip(f"not built with {request.param}: {reason}")
    yield
    monkeypatch.undo()
    for cached in (c_library._library, c_library.function):
        cached.cache_clear()


def whole_numbers(*shape: int) -> torch.Tensor:
    """Numbers that are codes themselves: a row's largest is 127."""
    x = torch.randint(-127, 128, shape).float()
    x[..., 0] = 127
    return x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_numbers_that_are_codes_give_the_exact_sums(built, dtype):
    for outputs, width in SHAPES:
        x, weight = whole_numbers(3, width).to(dtype), whole_numbers(outputs, width).to(dtype)
        expected = x.double() @ weight.double().T
        for rows in (1, 2, 3):
            found = Linear(weight, int8=True)(x[:rows]).double()
            torch.testing.assert_close(
                found, expected[:rows].to(dtype).double(), rtol=1e-6, atol=1e-2
            )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_products_of_the_weights_themselves_are_those_of_float64(built, dtype):
    for outputs, width in SHAPES:
        x, weight = torch.randn(3, width).to(dtype), torch.randn(outputs, width).to(dtype)
        found, expected = Linear(weight)(x).double(), x.double() @ weight.double().T
        unit = 2e-2 if dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(found, expected, rtol=unit, atol=unit * width**0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_error_is_at_most_that_of_rounding_both_sides(built, dtype):
    for outputs, width in SHAPES:
        x, weight = torch.randn(3, width).to(dtype), torch.randn(outputs, width).to(dtype)
        found = Linear(weight, int8=True)(x).double()
        x, weight = x.double(), weight.double()
        half_x, half_w = (t.abs().amax(-1, keepdim=True) / 254 for t in (x, weight))
        bound = x.abs().sum(-1, keepdim=True) * half_w.T + half_x * weight.abs().sum(-1)
        bound += width * half_x * half_w.T
        exact = x @ weight.T
        rounding = 1e-5 * bound + (dtype == torch.bfloat16) * exact.abs() / 128
        assert ((found - exact).abs() <= bound + rounding).all()


def test_rows_and_outputs_of_zeros_are_zeros(built):
    weight, x = torch.randn(20, 8), torch.randn(2, 8)
    weight[3], x[1] = 0, 0
    found = Linear(weight, int8=True)(x)
    assert not found[:, 3].any() and not found[1].any() and found[0].count_nonzero() == 19


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_numbers_that_are_not_finite_give_nan_in_their_own_row_or_output(built, dtype, wrong):
    for width, at in ((33, 0), (33, 15), (33, 32), (3, 1)):
        weight, x = torch.randn(20, width).to(dtype), torch.randn(3, width).to(dtype)
        weight[4, at] = x[1, at] = wrong
        expected = torch.zeros(3, 20, dtype=torch.bool)
        expected[1] = expected[:, 4] = True
        assert torch.equal(Linear(weight, int8=True)(x).isnan(), expected)


def test_rows_and_outputs_of_the_smallest_numbers_are_zeros(built):
    weight, x = torch.randn(20, 8), torch.randn(2, 8)
    weight[3], x[1] = 1e-40, -1e-39
    found = Linear(weight, int8=True)(x)
    assert not found[:, 3].any() and not found[1].any() and found.isfinite().all()


def test_sums_that_32_bits_may_not_hold_are_refused(built):
    x = torch.ones(1, WIDEST)
    assert Linear(x, int8=True)(x).item() == pytest.approx(WIDEST)
    with pytest.raises(ValueError, match="32 bits"):
        Linear(torch.ones(1, WIDEST + 1), int8=True)


def test_a_row_has_the_same_bits_beside_others(built):
    weight, x = torch.randn(70, 90), torch.randn(5, 90)
    product = Linear(weight, int8=True)
    assert torch.equal(product(x), torch.cat([product(row[None]) for row in x]))
