"""What is tried out on a CPU before training, and that it is used only where it is exact."""

import pytest
import torch

from dsv3_mtp.ops import tuning


def test_the_probe_leaves_precision_and_random_numbers_as_they_were():
    state = torch.random.get_rng_state()
    for precision in ("highest", "medium"):
        torch.set_float32_matmul_precision(precision)
        tuning.onednn_exact()
        assert torch.get_float32_matmul_precision() == precision
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize(
    ("rounds", "intel", "used"), [(False, False, True), (True, False, False), (False, True, False)]
)
def test_onednn_is_used_only_where_it_is_exact_and_mkl_is_not_at_home(
    monkeypatch, rounds, intel, used
):
    """`rounds`: a CPU on which precision "medium" computes in bfloat16, whatever this one does."""
    matmul = torch.Tensor.__matmul__

    def product(x, y):
        low = (
            rounds and x.dtype == torch.float32 and torch.get_float32_matmul_precision() == "medium"
        )
        if low:
            return matmul(x.bfloat16(), y.bfloat16()).float()
        return matmul(x.double(), y.double()).to(x.dtype)

    monkeypatch.setattr(torch.Tensor, "__matmul__", product)
    monkeypatch.setattr(tuning, "mkl_uses_the_whole_cpu", lambda: intel)
    notes = tuning.tune_cpu()
    assert (
        (torch.get_float32_matmul_precision() == "medium")
        == used
        == any("oneDNN" in note for note in notes)
    )
