"""What a start is recorded as, and what a resumed run compares, for every kind of head."""

import subprocess
from pathlib import Path

import pytest

from dsv3_mtp.heads import registry
from dsv3_mtp.runs import folder
from dsv3_mtp.runs.folder import changed_settings, describe_start
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


def test_only_changed_code_makes_a_tree_dirty(tmp_path, monkeypatch):
    source = tmp_path / "package" / "source.py"
    source.parent.mkdir()
    source.write_text("")
    monkeypatch.setattr(folder, "__file__", str(source))

    def git(*arguments):
        author = ("-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false")
        subprocess.run(["git", *author, *arguments], cwd=tmp_path, check=True)

    def dirty():
        return describe_start(world_size=1, command=[], sources={})["git_dirty"]

    git("init", "-q")
    assert dirty()  # untracked code
    git("add", ".")
    git("commit", "-q", "-m", "first")
    assert not dirty()
    (tmp_path / "my_lambda.yaml").write_text("")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a b.txt").write_text("")
    assert not dirty()
    (tmp_path / "notes" / "\u00e4 b.py").write_text("")  # git quotes such names unless asked not to
    assert dirty()
    (tmp_path / "notes" / "\u00e4 b.py").unlink()
    source.write_text("changed = True")
    assert dirty()
    git("mv", "package/source.py", "package/moved.py")
    assert dirty()
