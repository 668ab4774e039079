"""Whatever a JSON file holds, its reader gives the content or one sentence that names the file."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import with_config
from typing_extensions import TypedDict

from dsv3_mtp.files import checked
from dsv3_mtp.files.checked import OPEN, parse_json, read_json


@with_config(OPEN)
class Shape(TypedDict):
    """One of each that the project's own files have."""

    count: int
    share: float
    name: str
    ranges: list[tuple[int, int]]


GOOD = {"count": 3, "share": 0.5, "name": "é", "ranges": [[0, 1], [1, 2]], "more": {"kept": [None]}}
BAD = {
    "nothing": b"",
    "blanks": b" \n",
    "cut off": json.dumps(GOOD).encode()[:-5],
    "not UTF-8": b'{"name": "\xff"}',
    "binary": bytes(range(256)),
    "nested without end": b"[" * 100_000,
    "nested without end, in a key": b'{"count":' * 100_000,
    "a list": b"[]",
    "null": b"null",
    "a number of 10,000 digits": b'{"count": ' + b"9" * 10_000 + b"}",
    "a key missing": json.dumps({k: v for k, v in GOOD.items() if k != "share"}).encode(),
    "text for a number": json.dumps(GOOD | {"count": "3"}).encode(),
    "true for a number": json.dumps(GOOD | {"count": True}).encode(),
    "a float for a count": json.dumps(GOOD | {"count": 3.5}).encode(),
    "a range of three": json.dumps(GOOD | {"ranges": [[0, 1, 2]]}).encode(),
}


def test_a_good_file_comes_back_whole(tmp_path):
    path = tmp_path / "x.json"
    path.write_text(json.dumps(GOOD), encoding="utf-8")
    found = read_json(path, Shape, "delete it")
    assert found == GOOD | {"ranges": [(0, 1), (1, 2)]}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_is_one_sentence_with_its_name_and_the_remedy(tmp_path, case):
    path = tmp_path / "x.json"
    path.write_bytes(BAD[case])
    with pytest.raises(ValueError) as error:
        read_json(path, Shape, "delete it, and it is made again")
    text = str(error.value)
    assert text.startswith(f"{path}: damaged (")
    assert text.endswith("; delete it, and it is made again")
    assert len(text.splitlines()) == 1 and len(text) < 500


def test_a_file_that_is_none_or_too_large_is_told_too(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"x: cannot be read \(No such file.*; make it$"):
        read_json(tmp_path / "x", Shape, "make it")
    with pytest.raises(ValueError, match="Is a directory"):
        read_json(tmp_path, Shape, "make it")
    monkeypatch.setattr(checked, "LARGEST", 10)
    (tmp_path / "x").write_text(json.dumps(GOOD))
    with pytest.raises(ValueError, match="more than 10"):
        read_json(tmp_path / "x", Shape, "make it")


@given(st.binary(max_size=60))
def test_no_bytes_end_in_anything_but_a_value_or_a_sentence(content):
    try:
        parse_json(content, Shape)
    except ValueError as error:
        assert str(error) and "\n" not in str(error)
