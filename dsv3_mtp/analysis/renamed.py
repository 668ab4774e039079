"""Does a model copy names that it has never seen? Gloeckle et al. (arXiv 2404.19737, section 4.1).

They give the characters of stories names of two random tokens, and count how often the second token
is right once the name has been mentioned. Here the names are those of Python code: in a window of
validation text every name that comes back, no keyword and nothing of `builtins`, is written as two
tokens drawn for this window, of which the first stands nowhere else in it. The second follows from
nothing but an earlier mention, so that first mentions are the floor.

Tokens are a byte-level vocabulary's: the first token of a name takes the space in front of it, as
such a tokenizer writes it.
"""

import builtins
import itertools
import keyword
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F

from dsv3_mtp.analysis.classes import LONGEST, PYTHON, is_python, python_text
from dsv3_mtp.data.source import Source
from dsv3_mtp.data.tokenizer import DocumentEncoder
from dsv3_mtp.model.causal_lm import DeepseekV3MTP
from dsv3_mtp.tasks.base import Draws

FEWEST = 8  # names that a vocabulary must have
KEPT = frozenset(dir(builtins))
BATCH = 16  # windows that are read at once


@dataclass(frozen=True)
class Renamed:
    """A window of text with other names."""

    tokens: list[int]  # L
    later: list[int]  # where the second tokens of names stand that were mentioned before
    first: list[int]  # and those of first mentions


@dataclass(frozen=True)
class Names:
    """What the names of a vocabulary are made of."""

    plain: list[int]  # first tokens of a name
    spaced: list[int]  # the same with a space in front, in the same order
    second: list[int]
    space: int | None  # a space alone


def name_tokens(encoder: DocumentEncoder) -> Names:
    """Tokens of letters alone; those that a name begins with exist with and without a space."""
    texts = {
        encoder.tokenizer.decode([token], skip_special_tokens=False): token
        for token in range(encoder.vocab_size)
    }
    words = {text: token for text, token in texts.items() if text.isascii() and text.isalpha()}
    both = [text for text in words if f" {text}" in texts and not keyword.iskeyword(text)]
    return Names(
        plain=[words[text] for text in both],
        spaced=[texts[f" {text}"] for text in both],
        second=list(words.values()),
        space=texts.get(" "),
    )


def renamed_windows(
    source: Source, encoder: DocumentEncoder, *, count: int, length: int
) -> list[Renamed]:
    """At most `count` windows of `length` tokens, evenly spread over documents that Python's
    tokenizer can read; the same for every model. Empty: the text is no Python, or the vocabulary
    has no tokens for names.
    """
    if not is_python(source.path) or len((names := name_tokens(encoder)).plain) < FEWEST:
        return []
    starts = np.asarray(source.document_starts)
    places = [  # the last token of a document, its end of text, is not read
        (document, place)
        for document, (begin, end) in enumerate(itertools.pairwise(starts))
        if end - begin <= LONGEST
        for place in range(0, int(end - begin) - 1 - 2 * length, 2 * length)
    ]

    @cache
    def read(document: int) -> tuple[str, np.ndarray, list[tuple[int, int]]] | None:
        return python_text(
            source.read(int(starts[document]), int(starts[document + 1]) - 1), encoder
        )

    found = []
    for number in range(min(count, len(places))):
        document, place = places[number * len(places) // min(count, len(places))]
        if (known := read(document)) is None:
            continue
        text, codes, offsets = known
        begin, end = offsets[place][0], offsets[place + 2 * length][0]
        pieces = list(_pieces(text[begin:end], codes[begin:end]))
        window = _rename(pieces, names, encoder, number)
        if len(window.tokens) >= length:
            found.append(_cut(window, length))
    return found


def _pieces(text: str, codes: np.ndarray) -> Iterator[tuple[str, bool]]:
    """The text in order, cut into names (True) and what lies between them."""
    named = np.concatenate([[False], codes == PYTHON.index("name"), [False]])
    edges = np.flatnonzero(named[1:] != named[:-1])
    for begin, end in zip([0, *edges], [*edges, len(text)], strict=True):
        if begin < end:
            yield text[begin:end], bool(named[begin + 1])


def _rename(
    pieces: Sequence[tuple[str, bool]], names: Names, encoder: DocumentEncoder, seed: int
) -> Renamed:
    ids: dict[str, list[int]] = {
        text: encoder.tokenizer.encode(text, add_special_tokens=False).ids for text, _ in pieces
    }
    written = set(itertools.chain.from_iterable(ids.values()))
    both = zip(names.plain, names.spaced, strict=True)
    free = [pair for pair in both if written.isdisjoint(pair)]
    counts = Counter(text for text, named in pieces if named and text not in KEPT)
    often = [text for text, n in counts.most_common(len(free)) if n > 1]
    draws = Draws(seed)
    begins = [free[n] for n in draws.sample(len(free), len(often))]
    ends = [token for token in names.second if token not in dict(begins)]
    order = draws.sample(len(ends), len(often))
    given = {text: (begins[n], ends[order[n]]) for n, text in enumerate(often)}
    tokens: list[int] = []
    later, mentioned = [], {}
    for text, _ in pieces:
        if text not in given:
            tokens += ids[text]
            continue
        (plain, spaced), end = given[text]
        if tokens and tokens[-1] == names.space:
            tokens[-1] = spaced
        else:
            tokens.append(plain)
        tokens.append(end)
        if text in mentioned:
            later.append(len(tokens) - 1)
        else:
            mentioned[text] = len(tokens) - 1
    return Renamed(tokens, later, list(mentioned.values()))


def _cut(window: Renamed, length: int) -> Renamed:
    later, first = ([p for p in places if p < length] for places in (window.later, window.first))
    return Renamed(window.tokens[:length], later, first)


@torch.no_grad()
def second_tokens(
    model: DeepseekV3MTP, windows: Sequence[Renamed], *, device: torch.device
) -> dict[str, float]:
    """`renamed/second_token`: share of the second tokens of names mentioned before that are the
    main head's first choice, given the true tokens before them; `renamed/first_mention`: the same
    of first mentions, where nothing says which it is. Empty: there are none.
    """
    right, places = np.zeros(2), np.zeros(2)
    for start in range(0, len(windows), BATCH):
        batch = windows[start : start + BATCH]
        tokens = torch.tensor([window.tokens for window in batch], device=device)
        # a slot for every token: the targets behind the last one are of no head that is read
        hidden = model.head_rows(F.pad(tokens, (0, model.lookahead))).by_depth(model.depths)[0]
        assert isinstance(hidden, torch.Tensor)  # (B, L, C)
        for kind, name in enumerate(("later", "first")):
            found = [(row, p) for row, window in enumerate(batch) for p in getattr(window, name)]
            if found:
                rows, at = torch.tensor(found, device=device).T
                choices = model.lm_head(hidden[rows, at - 1]).argmax(-1)
                right[kind] += int((choices == tokens[rows, at]).sum())
                places[kind] += len(found)
    if not places.all():
        return {}
    later, first = right / places
    return {"renamed/second_token": float(later), "renamed/first_mention": float(first)}
