import hashlib
import json
from pathlib import Path

import pytest

from dsv3_mtp.data import sitelib
from dsv3_mtp.data.prepare import Arguments, prepare
from dsv3_mtp.data.sitelib import SHIFT_PER_MILLE, VAL_PER_MILLE, is_shift, sitelib_inputs
from dsv3_mtp.data.source import open_source

# Two names on each side of the rule, which is fixed: sha256 of "shift NAME" modulo 1000, below 100.
KEPT, HELD = ["torch", "numpy"], ["scikit-learn", "requests"]


def text(number: int) -> str:
    return f"# file {number} of an installed package\n" * 3 + f"value = {number}\n"


def install(site: Path, name: str, version: str, files: dict[str, str]) -> None:
    """What an installer leaves of a distribution."""
    info = site / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    for path, content in files.items():
        (site / path).parent.mkdir(parents=True, exist_ok=True)
        (site / path).write_text(content)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "RECORD").write_text("".join(f"{path},,\n" for path in files))


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A site-packages folder and a standard library of a few files."""
    monkeypatch.setattr(sitelib, "MIN_BYTES", 1000)
    root, library = tmp_path / "site-packages", tmp_path / "lib"
    for number, name in enumerate(
        ["torch", "numpy", "scikit_learn", "requests", "dsv3_mtp", "pip"]
    ):
        module = {"scikit_learn": "sklearn"}.get(name, name)
        files = {f"{module}/m{i}.py": text(1000 * number + i) for i in range(200)}
        install(root, name, f"1.{number}", files)
    (root / "sklearn/copy.py").write_text(text(3))  # torch has it too
    (root / "torch/again.py").write_text(text(4))
    (root / "torch/__pycache__").mkdir()
    (root / "torch/__pycache__/m0.py").write_text(text(9999))
    (root / "loose.py").write_text(text(8888))
    (root / "torch/latin.py").write_bytes(b"# \xe9\n" * 30)
    (library / "site-packages/x").mkdir(parents=True)
    (library / "site-packages/x/a.py").write_text(text(7777))
    (library / "os.py").write_text(text(6666))
    return root, library


def test_the_rule_that_holds_packages_out_is_fixed():
    assert not any(map(is_shift, [*KEPT, "python"]))
    assert all(map(is_shift, HELD))
    names = [f"package-{n}" for n in range(20_000)]
    assert sum(map(is_shift, names)) / len(names) == pytest.approx(SHIFT_PER_MILLE / 1000, abs=0.01)


def test_packages_are_whole_and_files_are_distinct(site: tuple[Path, Path]):
    inputs = sitelib_inputs(*site)
    splits: dict[str, set[str]] = {}
    for file in inputs.files:
        splits.setdefault(file.package, set()).add(file.split)
    assert splits["scikit-learn"] == splits["requests"] == {"shift"}
    assert splits["torch"] == splits["numpy"] == {"train", "val"}
    assert splits.keys() == {*KEPT, *HELD, "python", "loose"}  # neither this project nor installers
    hashes = [file.sha256 for file in inputs.files]
    assert len(set(hashes)) == len(hashes)
    names = {file.name for file in inputs.files}
    assert names.isdisjoint({"sklearn/copy.py", "torch/m4.py", "torch/latin.py"})
    assert {"torch/m3.py", "torch/again.py", "os.py"} <= names
    assert not any("site-packages" in name or "__pycache__" in name for name in names)
    assert inputs.versions["scikit-learn"] == "1.2"
    held = [file for file in inputs.files if file.split == "val"]
    assert len(held) / 401 == pytest.approx(VAL_PER_MILLE / 1000, abs=0.02)


def test_the_fingerprint_is_that_of_the_text_and_the_manifest_lists_it(site, monkeypatch, tmp_path):
    inputs = sitelib_inputs(*site)
    assert inputs.fingerprint == sitelib_inputs(*site).fingerprint
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(site[name == "stdlib"]))
    index = prepare(tmp_path / "out", Arguments(corpus="sitelib", vocab_size=280))
    assert index["manifest_hash"] == inputs.fingerprint
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["corpus"] == "sitelib"
    assert manifest["packages"]["numpy"]["version"] == "1.1"
    assert manifest["packages"]["requests"]["shift"]
    assert len(manifest["files"]) == len(inputs.files)
    for split in ("train", "val", "shift"):
        source = open_source(tmp_path / "out", split)
        assert source.manifest_hash == inputs.fingerprint
        chosen = [file for file in inputs.files if file.split == split]
        assert source.documents == len(chosen)
        assert source.bytes == sum(file.size for file in chosen)
    (site[0] / "numpy/m5.py").write_text(text(5555))
    assert sitelib_inputs(*site).fingerprint != inputs.fingerprint


def test_a_file_that_changes_while_it_is_read_is_refused(site: tuple[Path, Path]):
    inputs = sitelib_inputs(*site)
    first = inputs.files[0]
    document = next(inputs.read())
    assert (
        document.sha256.hex() == first.sha256 == hashlib.sha256(document.text.encode()).hexdigest()
    )
    first.path.write_text(text(1))
    with pytest.raises(ValueError, match="changed while it was read"):
        next(inputs.read())


def test_an_environment_without_packages_says_what_to_do(tmp_path: Path):
    for name in ("site", "lib"):
        (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match="sitelib needs at least 20"):
        sitelib_inputs(tmp_path / "site", tmp_path / "lib")
