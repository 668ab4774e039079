"""When the power fails at any point of a preparation, the folder is whole or not there, and the
next start makes the same bytes of what is left.
"""

import json
from pathlib import Path

import pytest

from dsv3_mtp.data import prepare as preparation
from dsv3_mtp.data import tokenise
from dsv3_mtp.data.arguments import Arguments
from dsv3_mtp.data.tokenizer import train_tokenizer
from tests.conftest import contents
from tests.power import failing


@pytest.mark.parametrize(
    "every", [5, pytest.param(1, marks=pytest.mark.slow)], ids=["every 5th point", "every point"]
)
def test_a_prepared_folder_is_whole_or_absent(tmp_path, monkeypatch, every):
    monkeypatch.setattr(tokenise, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(tokenise, "BATCH_DOCUMENTS", 9)
    words = [json.dumps({"text": f"line {n} says {n * n % 97}"}) + "\n" for n in range(60)]
    (tmp_path / "words.jsonl").write_text("".join(words))
    (tmp_path / "tokenizer.json").write_text(train_tokenizer(words, 280))
    arguments = Arguments(
        inputs=(str(tmp_path / "words.jsonl"),),
        tokenizer=str(tmp_path / "tokenizer.json"),
        val_fraction=0.2,
        shard_tokens=150,
    )
    preparation.prepare(tmp_path / "whole", arguments)
    whole = contents(tmp_path / "whole")
    assert sum(name.endswith(".bin") for name in whole) > 3
    (tmp_path / "disk").mkdir()
    there, points, begun = [], 0, set()

    def goes_on(left: Path) -> None:
        nonlocal points
        there.append((left / "new").exists())
        begun.update(left.glob("new.partial/progress.json"))
        if there[-1]:
            assert contents(left / "new") == whole
        elif points % every == 0:
            preparation.prepare(left / "new", arguments)
            assert contents(left / "new") == whole
        points += 1

    with failing(tmp_path / "disk", goes_on, tmp_path):
        preparation.prepare(tmp_path / "disk/new", arguments)
    assert not there[0] and all(there[-2:]) and begun
