"""What a resumed run compares, for every kind of head."""

from pathlib import Path

import pytest

from dsv3_mtp.heads import registry
from dsv3_mtp.runs.folder import changed_settings
from tests.conftest import tiny


@pytest.mark.parametrize("mode", ["none", *registry()])
def test_a_checkpoint_without_a_head_s_newer_options_resumes_with_their_defaults(mode):
    config = tiny({"mtp.mode": mode, "mtp.num_nextn_predict_layers": 2})
    options = {} if mode == "none" else config.mtp.kind.Options.model_fields
    saved = config.to_dict()
    saved["mtp"] = {key: value for key, value in saved["mtp"].items() if key not in options}
    assert changed_settings(saved, config, Path("runs/a/checkpoints/b"), finished=False) == []
    saved["mtp"]["num_nextn_predict_layers"] = 1
    with pytest.raises(ValueError, match=r"mtp\.num_nextn_predict_layers: 1 -> 2"):
        changed_settings(saved, config, Path("runs/a/checkpoints/b"), finished=False)
