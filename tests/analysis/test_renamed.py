"""Windows with other names against their own text, and the count against models that are known."""

import ast
import bisect
import heapq
import itertools
import queue
import textwrap
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from dsv3_mtp.analysis.classes import python_text
from dsv3_mtp.analysis.renamed import (
    KEPT,
    _pieces,
    _rename,
    name_tokens,
    renamed_windows,
    second_tokens,
)
from dsv3_mtp.data.prepare import Arguments, prepare
from dsv3_mtp.data.source import Source, open_source
from dsv3_mtp.data.tokenizer import DocumentEncoder, load_encoder

CPU = torch.device("cpu")
LENGTH = 96


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> tuple[Source, DocumentEncoder]:
    """Files of Python's own library."""
    out = tmp_path_factory.mktemp("python") / "out"
    inputs = tuple(module.__file__ for module in (ast, bisect, heapq, queue, textwrap, zipfile))
    prepare(out, Arguments(inputs=inputs, vocab_size=400, val_fraction=0.5), say=str)
    return open_source(out, "val"), load_encoder(out / "tokenizer.json")


def test_a_text_keeps_everything_but_the_names_that_come_back(text):
    source, encoder = text
    begin, end = source.document_starts[0:2]
    known = python_text(source.read(int(begin), int(end) - 1), encoder)
    assert known is not None
    written, codes, _ = known
    pieces = list(_pieces(written, codes))
    assert "".join(piece for piece, _ in pieces) == written
    part = pieces[:80]
    found = _rename(part, name_tokens(encoder), encoder, 3)
    assert found.first and found.later
    said: dict[str, str] = {}  # the name as it was -> as it is written now
    places = iter(sorted([*found.first, *found.later]))
    place, expected = next(places), ""
    for piece, named in part:
        ahead = encoder.tokenizer.decode(found.tokens[: place + 1])
        new = encoder.tokenizer.decode(found.tokens[place - 1 : place + 1]).strip()
        if named and piece not in KEPT and ahead == expected + new:
            assert (piece in said) == (place in found.later)
            assert said.setdefault(piece, new) == new != piece
            piece, place = new, next(places, place)
        expected += piece
    assert encoder.tokenizer.decode(found.tokens) == expected
    assert next(places, None) is None and len(said) == len(found.first)


def test_windows_are_the_same_for_every_model_and_their_names_are_of_two_tokens(text):
    source, encoder = text
    windows = renamed_windows(source, encoder, count=6, length=LENGTH)
    assert windows and windows == renamed_windows(source, encoder, count=6, length=LENGTH)
    names = name_tokens(encoder)
    begins = dict(zip(names.spaced, names.plain, strict=True)) | {p: p for p in names.plain}
    seconds = []
    for window in windows:
        assert len(window.tokens) == LENGTH
        said = {}
        for place in sorted([*window.first, *window.later]):
            begin, second = begins[window.tokens[place - 1]], window.tokens[place]
            assert (begin in said) == (place in window.later)
            assert said.setdefault(begin, second) == second
        assert len(set(said.values())) == len(said)
        seconds.append(sorted(said.items()))
    assert len({str(names) for names in seconds}) > 1  # drawn for every window


def test_a_window_ends_within_its_document(text):
    source, encoder = text
    for begin, end in itertools.pairwise(source.document_starts):
        for length in ((end - begin) // 2, (end - begin - 1) // 2, (end - begin - 2) // 2):
            renamed_windows(source, encoder, count=100, length=int(length))


def test_text_that_is_no_python_has_none(text, tmp_path):
    (tmp_path / "a.txt").write_text("def of any kind\n" * 400)
    (tmp_path / "b.txt").write_text("def of another kind\n" * 400)
    tokenizer = str(Path(text[0].path) / "tokenizer.json")
    inputs = (str(tmp_path / "*.txt"),)
    prepare(tmp_path / "out", Arguments(inputs=inputs, tokenizer=tokenizer, val_fraction=0.5))
    source = open_source(tmp_path / "out", "val")
    assert renamed_windows(source, text[1], count=6, length=LENGTH) == []


class Known:
    """A model whose first choice behind the tokens so far is `choose(tokens)`."""

    lookahead, depths = 1, 0

    def __init__(self, choose, vocab: int):
        self.choose, self.vocab = choose, vocab

    def head_rows(self, tokens):
        rows = [[self.choose(row[: n + 1]) for n in range(len(row) - 1)] for row in tokens.tolist()]
        hidden = F.one_hot(torch.tensor(rows), self.vocab).float()
        return SimpleNamespace(by_depth=lambda depths: [hidden])

    def lm_head(self, hidden):
        return hidden


def test_what_copies_is_right_behind_a_mention_and_what_guesses_is_not(text):
    source, encoder = text
    windows = renamed_windows(source, encoder, count=6, length=LENGTH)
    names = name_tokens(encoder)
    begins = dict(zip(names.spaced, names.plain, strict=True))

    def copy(tokens):
        plain = [begins.get(token, token) for token in tokens]
        places = [n for n, token in enumerate(plain[:-1]) if token == plain[-1]]
        return tokens[places[-1] + 1] if places else 0

    found = second_tokens(Known(copy, encoder.vocab_size), windows, device=CPU)
    assert found == {"renamed/second_token": 1.0, "renamed/first_mention": 0.0}
    none = second_tokens(Known(lambda tokens: 0, encoder.vocab_size), windows, device=CPU)
    assert none == {"renamed/second_token": 0.0, "renamed/first_mention": 0.0}
    assert second_tokens(Known(copy, encoder.vocab_size), [], device=CPU) == {}


@pytest.mark.parametrize("mode", ["sequential", "parallel", "dspark"])
def test_of_a_model_it_is_the_main_heads_first_choice(text, make_tiny_config, mode):
    from dsv3_mtp.model.causal_lm import DeepseekV3MTP
    from tests.made_runs import randomise

    source, encoder = text
    windows = renamed_windows(source, encoder, count=6, length=LENGTH)
    config = make_tiny_config({"mtp.mode": mode, "model.vocab_size": encoder.vocab_size})
    model = randomise(DeepseekV3MTP(config.model, config.mtp)).eval()
    found = second_tokens(model, windows, device=CPU)
    right = []
    for window in windows:
        padded = torch.tensor([window.tokens + [0] * model.lookahead])
        choices = model.logits(padded)[0, 0].argmax(-1).tolist()
        right += [choices[place - 1] == window.tokens[place] for place in window.later]
    assert found["renamed/second_token"] == pytest.approx(sum(right) / len(right))
