import codecs
import gzip
import hashlib
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dsv3_mtp.data.documents import FileInputs

TEXTS = [f"document number {i}\r\nwith caf\u00e9" for i in range(30)]


def jsonl(texts: list[str]) -> bytes:
    return b"\n".join(json.dumps({"text": text, "n": 1}).encode() for text in texts) + b"\n"


def saved_dataset(folder: Path, texts: list[str]) -> Path:
    """What datasets.Dataset.save_to_disk writes, in two Arrow files."""
    folder.mkdir()
    names = ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
    for name, part in zip(names, (texts[:7], texts[7:]), strict=True):
        table = pa.table({"text": part})
        with (
            pa.OSFile(str(folder / name), "wb") as file,
            pa.ipc.new_stream(file, table.schema) as writer,
        ):
            writer.write_table(table, max_chunksize=4)
    state = {
        "_data_files": [{"filename": name} for name in names],
        "_split": None,
        "_fingerprint": "0",
    }
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text("{}")
    return folder


def write(kind: str, folder: Path) -> Path:
    path = folder / f"data.{kind}"
    match kind:
        case "jsonl":
            path.write_bytes(codecs.BOM_UTF8 + jsonl(TEXTS))
        case "jsonl.gz":
            path.write_bytes(gzip.compress(jsonl(TEXTS[:9])) + gzip.compress(jsonl(TEXTS[9:])))
        case "jsonl.zst":
            with pa.OSFile(str(path), "wb") as file, pa.CompressedOutputStream(file, "zstd") as out:
                out.write(jsonl(TEXTS))
        case "parquet":
            pq.write_table(pa.table({"n": range(30), "text": TEXTS}), path, row_group_size=8)
        case "dataset":
            saved_dataset(path, TEXTS)
        case "folder":
            path.mkdir()
            for i, text in enumerate(TEXTS):
                (path / f"{i:02d}.txt").write_bytes(codecs.BOM_UTF8 * (i % 2) + text.encode())
    return path


def inputs(*patterns: Path | str, **options) -> FileInputs:
    return FileInputs(
        [str(p) for p in patterns],
        **{"text_key": "text", "val_fraction": 0.3, "out": Path("none")} | options,
    )


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "jsonl.zst", "parquet", "dataset", "folder"])
def test_every_format_gives_the_same_documents_from_any_position_on(tmp_path: Path, kind: str):
    found = inputs(write(kind, tmp_path))
    documents = list(found.read())
    assert [document.text for document in documents] == TEXTS
    for document, text in zip(documents, TEXTS, strict=True):
        digest = int(hashlib.sha256(text.encode()).hexdigest(), 16)
        assert document.split == ("val" if digest % 1_000_000 < 300_000 else "train")
    for i in (0, 6, 7, 20, 29):
        rest = list(found.read(documents[i].file, documents[i].record))
        assert [document.text for document in rest] == TEXTS[i + 1 :]


def test_folders_are_sorted_hidden_files_left_out_and_globs_and_repeats_understood(tmp_path: Path):
    for name in ["b/2.md", "b/1.txt", "a.py", ".git/x", "b/.hidden", "b/__pycache__/x.pyc"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    assert [d.text for d in inputs(tmp_path).read()] == ["a.py", "b/1.txt", "b/2.md"]
    found = inputs(
        tmp_path / "a.py", f"{tmp_path}/**/*.txt", tmp_path / "a.py", tmp_path / "b/../a.py"
    )
    assert [d.text for d in found.read()] == ["a.py", "b/1.txt"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n\n{"text": \n', r"a\.jsonl, line 3: not valid JSON"),
        (
            "a.jsonl",
            b'{"text": "x"}\n{"body": "y"}\n',
            r"a\.jsonl, line 2: has no key 'text', only \['body'\].*--text-key",
        ),
        ("a.jsonl", b'{"text": 5}\n', r"a\.jsonl, line 1: 'text' is int, must be a string"),
        ("a.jsonl", b'["x"]\n', r"a\.jsonl, line 1: is a JSON list"),
        ("a.jsonl", b"[" * 100_000, r"a\.jsonl, line 1: not valid JSON"),
        ("a.jsonl", b'{"text": "\xff"}\n', r"a\.jsonl, line 1: not valid JSON .*utf-8"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', r"a\.jsonl, line 1: 'text' has a lone surrogate"),
        (
            "a.jsonl.gz",
            gzip.compress(b'{"text": "x"}\n' * 9, mtime=0)[:-9],
            r"a\.jsonl\.gz, after line \d+: cannot be read",
        ),
        ("a.jsonl.gz", b"nothing", r"a\.jsonl\.gz, after line 0: cannot be read"),
        ("a.jsonl.zst", b"nothing", r"a\.jsonl\.zst, after line 0: cannot be read"),
        ("a.txt", b"one\ntwo \xff\n", r"a\.txt, line 2: byte 0xff is not UTF-8"),
        ("a.parquet", b"PAR1 nothing", r"a\.parquet, after row 0: cannot be read"),
        ("a.arrow", b"nothing at all", r"a\.arrow, after row 0: cannot be read"),
    ],
)
def test_bad_input_is_one_error_with_file_and_line(
    tmp_path: Path, name: str, content: bytes, message: str
):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list(inputs(tmp_path / name).read())


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"body": ["x"]}, r"a\.parquet: has no column 'text', only \['body'\]"),
        ({"text": ["x", None]}, r"a\.parquet, row 2: 'text' is NoneType"),
        ({"text": [1]}, r"a\.parquet, row 1: 'text' is int"),
    ],
)
def test_a_bad_column_is_one_error_with_file_and_row(tmp_path: Path, table, message: str):
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=message):
        list(inputs(tmp_path / "a.parquet").read())


def test_nothing_found_a_dataset_dict_and_a_torn_dataset_are_refused(tmp_path: Path):
    with pytest.raises(
        ValueError, match=r"none\.txt: no file is there or matches it\n'': no file is there"
    ):
        inputs(tmp_path / "none.txt", "")
    saved_dataset(tmp_path / "train", TEXTS)
    (tmp_path / "dataset_dict.json").write_text("{}")
    with pytest.raises(ValueError, match=r"a saved DatasetDict; give the folder of one.*train"):
        inputs(tmp_path)
    (tmp_path / "train/data-00001-of-00002.arrow").unlink()
    with pytest.raises(ValueError, match="files that are not there: data-00001"):
        inputs(tmp_path / "train")


def test_another_text_key_is_read(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text('{"body": "x", "text": 3}')
    assert [d.text for d in inputs(tmp_path / "a.jsonl", text_key="body").read()] == ["x"]


def test_the_folder_that_is_being_made_is_no_input_of_itself(tmp_path: Path):
    write("jsonl", tmp_path)
    for name in ("out", "out.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "log.txt").write_text("x")
    assert [path.name for path in inputs(tmp_path, out=tmp_path / "out").files] == ["data.jsonl"]


def test_the_end_of_a_text_file_can_be_its_validation_text(tmp_path: Path):
    text = "".join(f"line {n}\n" for n in range(100))
    for name, content in (("a.txt", text), ("b.txt", "x" * 50)):
        (tmp_path / name).write_text(content)
    options = {"text_key": "text", "val_fraction": 0.1, "out": tmp_path / "out"}
    read = FileInputs([str(tmp_path)], val_by_position=True, **options).read
    found = [(document.split, document.text) for document in read()]
    assert [split for split, _ in found] == ["train", "val"] * 2
    assert found[0][1] + found[1][1] == text and found[1][1].startswith("line 9")
    assert 0.05 < len(found[1][1]) / len(text) <= 0.1
    assert [text for _, text in found[2:]] == ["x" * 45, "x" * 5]
    again = [(d.split, d.text) for d in read(0, 1)]  # after an interruption
    assert again == found[1:]
    (tmp_path / "c.jsonl").write_bytes(jsonl(["x"]))
    with pytest.raises(ValueError, match=r"--val-by-position splits text files; .*c\.jsonl holds"):
        FileInputs([str(tmp_path)], val_by_position=True, **options)


def test_unreadable_files_are_left_out_on_request_and_named(tmp_path: Path):
    (tmp_path / "a.txt").write_text("good")
    (tmp_path / "b.gz").write_bytes(gzip.compress(b"text"))
    (tmp_path / "c.txt").write_text("good too")
    options = {"text_key": "text", "val_fraction": 0.0, "out": tmp_path / "out"}
    found = FileInputs([str(tmp_path)], skip_unreadable=True, **options)
    assert [document.text for document in found.read()] == ["good", "good too"]
    assert [path.name for path in found.skipped] == ["b.gz"]
    with pytest.raises(ValueError, match=r"b\.gz, line 1: .*--skip-unreadable"):
        list(FileInputs([str(tmp_path)], **options).read())
