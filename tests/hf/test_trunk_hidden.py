"""An MTP module that was trained on the trunk's state before its final norm (torchtitan's)."""

import json

import pytest
import torch

from dsv3_mtp.config import MTPConfig
from dsv3_mtp.hf import export_hf, import_hf, load_hf
from dsv3_mtp.hf.settings import TRUNK_HIDDEN
from dsv3_mtp.runs.model import load_model

PRE_NORM = MTPConfig(mode="sequential", num_nextn_predict_layers=1, trunk_hidden="pre_norm")


def test_the_import_says_so_and_keeps_it(make_run, tmp_path):
    run, _ = make_run()
    export_hf(run, tmp_path / "hf", dtype="fp32")
    import_hf(tmp_path / "hf", tmp_path / "usual")
    import_hf(tmp_path / "hf", tmp_path / "other", trunk_hidden="pre_norm")
    usual, other = (load_model(tmp_path / name).model for name in ("usual", "other"))
    assert other.mtp_config.options == PRE_NORM.options != usual.mtp_config.options
    assert usual.state_dict().keys() == other.state_dict().keys()
    # the same folder read again, without the run: generate --hf, evaluate --hf, train.init_from
    again, _ = load_hf(tmp_path / "other/weights")
    assert again.mtp_config.options == PRE_NORM.options
    tokens = torch.randint(0, 64, (1, 18))
    losses = [model(tokens).nll_sum[1].item() for model in (usual, other, again)]
    assert losses[1] == losses[2] != losses[0]
    with pytest.raises(ValueError, match="every reader of the layout feeds"):
        export_hf(tmp_path / "other", tmp_path / "back")


def test_what_it_cannot_be_is_refused(make_run, tmp_path):
    run, _ = make_run(mtp__num_nextn_predict_layers=2)
    export_hf(run, tmp_path / "two")
    with pytest.raises(ValueError, match="1 module at most"):
        import_hf(tmp_path / "two", tmp_path / "x", trunk_hidden="pre_norm")
    for more in ({"frozen": True}, {"trunk_only": True}):
        with pytest.raises(ValueError, match="--trunk-hidden is of MTP modules that are copied"):
            import_hf(tmp_path / "two", tmp_path / "x", trunk_hidden="pre_norm", **more)
    with pytest.raises(ValueError, match="trunk_hidden: pre_norm, the checkpoint's"):
        import_hf(tmp_path / "two", tmp_path / "x", sets=["mtp.trunk_hidden=pre_norm"])
    config = json.loads((tmp_path / "two/config.json").read_text())
    (tmp_path / "two/config.json").write_text(json.dumps(config | {TRUNK_HIDDEN: "middle"}))
    with pytest.raises(ValueError, match=f"{TRUNK_HIDDEN}: must be one of post_norm, pre_norm"):
        import_hf(tmp_path / "two", tmp_path / "x")
    assert not (tmp_path / "x").exists()
