"""Classes of tokens, against labels by hand and against Python's own tokenizer."""

import numpy as np
import pytest

from dsv3_mtp.analysis.classes import (
    CHARACTERS,
    PYTHON,
    character_classes,
    character_codes,
    python_classes,
    target_classes,
)
from dsv3_mtp.data.source import Source
from dsv3_mtp.data.tokenizer import DocumentEncoder, load_encoder, train_tokenizer

CODE = '''def f(x, y=2):  # two
    """A text
    of two lines."""

    if x != 0x1F:
        return x\\
            + y
'''


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> DocumentEncoder:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    path.write_text(train_tokenizer([CODE] * 3, 290))
    return load_encoder(path)


def names(codes) -> list[str]:
    return [PYTHON[code] for code in codes]


def test_every_character_has_the_class_of_its_python_token():
    codes = character_codes(CODE)
    assert codes is not None

    def of(part: str, offset: int = 0) -> str:
        return PYTHON[codes[CODE.index(part) + offset]]

    assert (of("def"), of("f(x"), of("(x"), of("=2"), of("2)")) == (
        *("keyword", "name", "operator", "operator", "number"),
    )
    assert of("# two") == of("two") == "comment"
    assert of('"""A') == of("A text") == of("of two") == of("    of two") == "string"
    assert of("    if") == of("        return", 5) == of("\n\n") == "indent"
    assert of("0x1F", 3) == "number" and of("!=", 1) == "operator"
    assert of("return") == "keyword" and of(" x\\") == "space" and of("\\\n") == "space"
    assert of("            + y") == "indent"  # a continued line begins with white space too


@pytest.mark.parametrize("text", ["print 'x", "a = '''", "x = $", "if x:\n        y\n    z\n"])
def test_what_python_cannot_read_has_no_classes(text: str):
    assert character_codes(text) is None


@pytest.mark.parametrize("ending", ["\n", "\r\n", "\r"])
def test_places_are_right_behind_every_line_ending(ending: str):
    text = f"a{ending}{ending}if bb:{ending}    ccc = 1{ending}"
    codes = character_codes(text)
    assert codes is not None
    found = {PYTHON[codes[text.index(part)]] for part in ("a", "bb", "ccc")}
    assert found == {"name"}
    assert PYTHON[codes[text.index("if")]] == "keyword"


def test_a_token_has_the_class_of_its_first_character_that_is_no_space(encoder: DocumentEncoder):
    ids = np.array([*encoder.tokenizer.encode(CODE).ids, encoder.eos_id])
    found, place = names(python_classes(ids, encoder)), 0
    codes = character_codes(CODE)
    assert codes is not None and found[-1] == "end of text"
    for token, kind in zip(ids[:-1], found, strict=False):
        text = encoder.tokenizer.decode([int(token)])
        shown = [k for k, c in enumerate(text) if not c.isspace()]
        if shown:
            assert kind == PYTHON[codes[place + shown[0]]], (text, kind)
        else:
            assert kind in ("indent", "space", "string"), (text, kind)
        place += len(text)
    assert place == len(CODE)


def test_a_document_that_is_not_its_own_text_is_not_read(encoder: DocumentEncoder):
    assert encoder.fim_ids is not None
    ids = np.array([encoder.fim_ids[0], *encoder.tokenizer.encode("a = 1").ids, encoder.eos_id])
    assert set(names(python_classes(ids, encoder)[:-1])) == {"not read"}


def test_other_text_is_classed_by_characters(encoder: DocumentEncoder):
    ids = np.array([*encoder.tokenizer.encode("x1 (\n").ids, encoder.eos_id])
    found = [CHARACTERS[code] for code in character_classes(ids, encoder)]
    assert (found[0], found[1], found[-1]) == ("letters", "digits", "end of text")
    assert "punctuation" in found and "white space" in found


def test_windows_get_the_classes_of_their_targets(encoder: DocumentEncoder):
    documents = [[*encoder.tokenizer.encode(text).ids, encoder.eos_id] for text in (CODE, "1 a")]
    stream = np.array([token for ids in documents for token in ids])
    starts = np.cumsum([0, *(len(ids) for ids in documents)])
    source = Source("x", "", None, None, None, (stream,), np.array([0, len(stream)]), starts)
    names_, found = target_classes(source, [0, len(stream) - 3], 4, encoder)
    whole = np.concatenate([character_classes(np.array(ids), encoder) for ids in documents])
    assert names_ == CHARACTERS
    # behind the last document the first follows
    assert found.tolist() == [whole[1:5].tolist(), [*whole[-2:], *whole[:2]]]
