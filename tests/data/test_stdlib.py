import hashlib
from pathlib import Path

import pytest

from dsv3_mtp.data.stdlib import MIN_FILES, stdlib_inputs

BODY = "# a file of the library\n" * 4


def library(root: Path, files: dict[str, bytes]) -> Path:
    for i in range(MIN_FILES):
        files[f"module{i:03d}.py"] = f"{BODY}x = {i}\n".encode()
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def test_tests_packages_and_tiny_files_are_left_out(tmp_path: Path):
    out = [
        "test/a.py",
        "json/tests/a.py",
        "idlelib/a.py",
        "site-packages/x/a.py",
        "config-3.11/a.py",
    ]
    out += ["_sysconfigdata__linux.py", "encodings/a.py", "a/__pycache__/a.py", "a/a.txt"]
    files = {name: BODY.encode() for name in [*out, "json/decoder.py", "contest.py"]} | {
        "tiny.py": b"x = 1\n"
    }
    names = [name for name, _ in stdlib_inputs(library(tmp_path, files)).texts]
    assert set(names) == {"json/decoder.py", "contest.py"} | {
        f"module{i:03d}.py" for i in range(MIN_FILES)
    }
    assert names == sorted(names)


def test_the_split_is_the_hash_of_the_path(tmp_path: Path):
    inputs = stdlib_inputs(library(tmp_path, {}))
    for (name, _), document in zip(inputs.texts, inputs.read(), strict=True):
        expected = int(hashlib.sha256(name.encode()).hexdigest(), 16) % 1000 < 100
        assert (document.split == "val") == expected
    assert {split for *_, split in inputs.manifest} == {"train", "val"}


def test_an_undecodable_file_is_skipped_and_named(tmp_path: Path):
    inputs = stdlib_inputs(library(tmp_path, {"latin.py": b"# \xe9\n" * 30}))
    assert [name for name, _, split in inputs.manifest if split == "skipped"] == ["latin.py"]
    assert "latin.py" not in dict(inputs.texts)


def test_the_manifest_hash_changes_with_any_byte(tmp_path: Path):
    before = stdlib_inputs(library(tmp_path / "a", {}))
    same = stdlib_inputs(library(tmp_path / "b", {}))
    assert before.fingerprint == same.fingerprint
    (tmp_path / "b/module007.py").write_bytes(BODY.encode())
    assert stdlib_inputs(tmp_path / "b").fingerprint != before.fingerprint


def test_a_python_without_sources_says_what_to_do(tmp_path: Path):
    with pytest.raises(ValueError, match=r"comes without its sources.*--input"):
        stdlib_inputs(tmp_path)


def test_this_python_has_its_sources():
    inputs = stdlib_inputs()
    assert 4e6 < sum(inputs.sizes) < 20e6
    assert "json/decoder.py" in dict(inputs.texts)
