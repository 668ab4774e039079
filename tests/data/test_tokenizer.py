import json
from pathlib import Path

import numpy as np
import pytest

from dsv3_mtp.data.source import open_source
from dsv3_mtp.data.stdlib import stdlib_inputs
from dsv3_mtp.data.tokenizer import (
    EOS_NAMES,
    SPECIAL_TOKENS,
    fim_split,
    load_encoder,
    recorded_eos,
    train_tokenizer,
)

TEXTS = [f"def f{i}(x):\n    return x + {i}  # caf\u00e9 \U0001f600\n" for i in range(50)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    path.write_text(train_tokenizer(TEXTS, 300))
    return path


def renamed(path: Path, folder: Path, names: dict[str, str]) -> Path:
    """A copy of a tokenizer.json with other special tokens."""
    text = json.dumps(json.loads(path.read_text()), ensure_ascii=False)
    for old, new in names.items():
        text = text.replace(json.dumps(old), json.dumps(new, ensure_ascii=False))
    (folder / "renamed.json").write_text(text, encoding="utf-8")
    return folder / "renamed.json"


@pytest.mark.parametrize(
    "text", ["", " a  b\r\n\t", "\x00\x7f", "caf\u00e9 \U0001f600", "<|endoftext|> <|fim_begin|>"]
)
def test_any_text_round_trips_and_is_never_taken_for_a_special_token(trained: Path, text: str):
    encoder = load_encoder(trained)
    (ids,) = encoder.encode([(text,)])
    assert ids[-1] == encoder.eos_id
    assert not np.isin(ids[:-1], range(len(SPECIAL_TOKENS))).any()
    assert encoder.tokenizer.decode(ids[:-1].tolist(), skip_special_tokens=False) == text


def test_a_trained_tokenizer_has_exactly_the_size_and_is_deterministic(trained: Path):
    encoder = load_encoder(trained)
    assert (encoder.vocab_size, encoder.eos_id, encoder.fim_ids) == (300, 0, (1, 2, 3))
    assert train_tokenizer(iter(TEXTS), 300) == trained.read_text()


@pytest.mark.parametrize(("size", "message"), [(259, "at least 260"), (100_000, "pairs for only")])
def test_an_impossible_vocabulary_size_is_refused(size: int, message: str):
    with pytest.raises(ValueError, match=message):
        train_tokenizer(TEXTS, size)


@pytest.mark.parametrize("name", EOS_NAMES)
def test_the_end_of_text_token_is_found_by_its_common_names(
    trained: Path, tmp_path: Path, name: str
):
    assert load_encoder(renamed(trained, tmp_path, {"<|endoftext|>": name})).eos_id == 0


def test_another_end_of_text_token_must_be_named(trained: Path, tmp_path: Path):
    path = renamed(trained, tmp_path, {"<|endoftext|>": "<stop>"})
    with pytest.raises(ValueError, match=r"no end-of-text token .*--eos"):
        load_encoder(path)
    with pytest.raises(ValueError, match="no end-of-text token '<end>'"):
        load_encoder(path, eos="<end>")
    assert load_encoder(path, eos="<stop>").eos_id == 0


@pytest.mark.parametrize(
    "beside", [("index.json", '{"eos_id": 3}'), ("config.json", '{"eos_token_id": 3}')]
)
def test_the_end_of_text_token_is_the_one_that_the_data_or_the_checkpoint_was_made_with(
    trained, tmp_path, beside
):
    path = renamed(trained, tmp_path, {"<|endoftext|>": "<stop>"})
    (tmp_path / beside[0]).write_text(beside[1])
    assert load_encoder(path, eos=recorded_eos(path)).eos_id == 3
    (tmp_path / beside[0]).write_text('{"eos_token_id": [0, 3]}')
    assert recorded_eos(path) is None


def test_truncation_and_padding_in_the_file_do_not_cut_documents(trained: Path, tmp_path: Path):
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(trained))
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=50)
    tokenizer.save(str(tmp_path / "cut.json"))
    documents = [("abcdefgh" * 20,), ("a",)]
    for cut, whole in zip(
        load_encoder(tmp_path / "cut.json").encode(documents),
        load_encoder(trained).encode(documents),
        strict=True,
    ):
        assert np.array_equal(cut, whole)


def test_what_is_no_tokenizer_is_refused(tmp_path: Path):
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(ValueError, match=r"x\.json: not a Hugging Face"):
        load_encoder(tmp_path / "x.json")
    with pytest.raises(ValueError, match=r"y\.json: no such file"):
        load_encoder(tmp_path / "y.json")


def test_fim_is_prefix_suffix_middle_and_can_be_undone(trained: Path):
    encoder = load_encoder(trained)
    begin, hole, end = encoder.fim_ids
    for number, text in enumerate(TEXTS):
        pieces = fim_split(text, rate=1.0, seed=0, document=number)
        assert len(pieces) == 3 and "".join(pieces) == text
        ids = encoder.encode([pieces])[0].tolist()
        assert ids[0] == begin and ids[-1] == encoder.eos_id
        at_hole, at_end = ids.index(hole), ids.index(end)
        prefix, suffix, middle = ids[1:at_hole], ids[at_hole + 1 : at_end], ids[at_end + 1 : -1]
        decode = encoder.tokenizer.decode
        assert decode(prefix) + decode(middle) + decode(suffix) == text


def test_the_fim_rate_holds_and_depends_on_seed_and_document_alone():
    chosen = [len(fim_split("some text", rate=0.1, seed=0, document=i)) == 3 for i in range(10_000)]
    assert 880 < sum(chosen) < 1120  # 4 standard deviations
    assert chosen != [
        len(fim_split("some text", rate=0.1, seed=1, document=i)) == 3 for i in range(10_000)
    ]
    cuts = {fim_split("abcdef", rate=1.0, seed=0, document=i) for i in range(2000)}
    assert len(cuts) == 7 * 8 // 2  # every pair of positions
    assert fim_split("abc", rate=0.0, seed=0, document=0) == ("abc",)


def test_a_prepared_folder_decodes_to_its_text(pystdlib: Path, small_stdlib: Path):
    encoder, source = load_encoder(pystdlib / "tokenizer.json"), open_source(pystdlib, "val")
    texts = []
    for start, stop in zip(source.document_starts[:-1], source.document_starts[1:], strict=True):
        texts.append(encoder.tokenizer.decode(source.read(int(start), int(stop) - 1).tolist()))
    assert texts == [d.text for d in stdlib_inputs(small_stdlib).read() if d.split == "val"]
    assert source.bytes == sum(len(text.encode()) for text in texts)


def test_a_word_without_end_is_learned_from_in_pieces():
    """At once it would take the trainer the square of its length, and give tokens that are half of
    it.
    """
    blob = [letter * 20_000 for letter in "x "]
    learned = json.loads(train_tokenizer(blob, 284))["model"]["vocab"]
    assert max(map(len, learned)) <= 1000
