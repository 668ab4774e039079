"""A reader whose corpus is another one is told so, before a run and in the report."""

import json
from pathlib import Path

from dsv3_mtp.study.corpus import corpus_note, other_corpus
from dsv3_mtp.study.load import load_study
from tests.study.toy import write_toy


def test_a_folder_of_another_corpus_is_named_by_its_hash(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = write_toy(tmp_path, lambda tree: tree.update(corpus="abc123"))
    sets = ["data.train=data/prepared", "data.val=data/prepared"]
    assert "not there, and will be made" in (corpus_note(load_study(path, sets)) or "")
    folder = tmp_path / "data/prepared"
    folder.mkdir()
    index = {
        "format": "dsv3_mtp.tokens",
        "version": 1,
        "manifest_hash": "abc123def",
        "vocab_size": 64,
        "eos_id": 0,
        "tokenizer_sha256": "0" * 64,
        "arguments": {},
        "splits": {},
    }
    (folder / "index.json").write_text(json.dumps(index))
    assert corpus_note(load_study(path, sets)) is None
    (folder / "index.json").write_text(json.dumps(index | {"manifest_hash": "9" * 64}))
    assert "The corpus is 999999999999, not abc123" in (corpus_note(load_study(path, sets)) or "")
    study = load_study(path, sets).study
    assert other_corpus(study, ["abc123fff"]) is None
    assert other_corpus(study, ["abc123fff", "0" * 64]) is not None


def test_a_study_that_names_no_corpus_says_nothing(tmp_path: Path):
    path = write_toy(tmp_path, lambda tree: tree.update(corpus=None))
    assert corpus_note(load_study(path)) is None
