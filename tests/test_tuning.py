"""What is tried out on a CPU before training, and that it is used only where it is exact."""

import pytest
import torch

from dsv3_mtp import kernels, tuning


@pytest.fixture(autouse=True)
def put_back():
    yield
    torch.set_float32_matmul_precision("highest")
    kernels.disable()


def test_the_probe_leaves_the_precision_as_it_was():
    for precision in ("highest", "medium"):
        torch.set_float32_matmul_precision(precision)
        tuning.onednn_pays()
        assert torch.get_float32_matmul_precision() == precision


@pytest.mark.parametrize(("rounds", "seconds", "pays"), [(False, 0.5, True), (True, 0.5, False), (False, 0.9, False)])
def test_onednn_is_used_only_where_it_is_exact_and_much_faster(monkeypatch, rounds, seconds, pays):
    """`rounds`: a CPU on which precision "medium" computes in bfloat16."""
    matmul = torch.Tensor.__matmul__

    def product(x, y):
        low = rounds and x.dtype == torch.float32 and torch.get_float32_matmul_precision() == "medium"
        return matmul(x.bfloat16(), y.bfloat16()).float() if low else matmul(x, y)

    monkeypatch.setattr(torch.Tensor, "__matmul__", product)
    medium = lambda: torch.get_float32_matmul_precision() == "medium"  # noqa: E731
    monkeypatch.setattr(tuning, "_cpu_seconds", lambda x, weight: seconds if medium() else 1.0)
    assert tuning.onednn_pays() == pays
    notes = tuning.tune_cpu()
    assert medium() == pays and any("oneDNN" in note for note in notes) == pays
