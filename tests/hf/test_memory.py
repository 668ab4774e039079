"""Export, import and loading never hold two copies of a model."""

import sys

import pytest

from tests.hf.measure import measure


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_is_a_few_tensors_not_a_model(tmp_path):
    found = measure(tmp_path, layers=6, hidden=512, experts=32, dtypes=("fp8",))
    copy = found["model"]["MiB"]
    assert copy > 100
    for name, values in found.items():
        if name.startswith(("export", "import")):
            assert values["peak_MiB"] < 0.6 * copy, name  # the largest tensor in float32, twice
        elif name.startswith("load"):
            assert values["anonymous_MiB"] < 1.6 * copy, name
