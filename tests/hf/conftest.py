"""Small runs for the tests of the Hugging Face layout."""

import pytest

from dsv3_mtp.model.causal_lm import DeepseekV3MTP
from tests.made_runs import randomise, write_run


@pytest.fixture
def make_run(tmp_path, make_tiny_config):
    """A function from config overrides to (run folder, its model)."""

    def make(name="run", *, step=7, **overrides):
        settings = {"run.name": name, "run.dir": str(tmp_path / "runs"), "train.dtype": "float32"}
        config = make_tiny_config(
            settings | {key.replace("__", "."): value for key, value in overrides.items()}
        )
        model = randomise(DeepseekV3MTP(config.model, config.mtp))
        return write_run(tmp_path / "runs" / name, config, model, step=step), model

    return make
