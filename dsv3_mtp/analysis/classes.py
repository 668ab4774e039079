"""What kind of token every target is: of Python code what Python's tokenizer says, of other text
its characters.

A token of the model may hold parts of several of Python's: its first character that is no white
space decides; white space alone is `indent` where it holds a line break or begins a line. Python's
tokenizer reads documents whole. One that it cannot read, or whose text does not give the same
tokens again (fill-in-the-middle), is `not read`.
"""

import io
import keyword
import tokenize
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from dsv3_mtp.data.shards import read_folder_index
from dsv3_mtp.data.source import Source
from dsv3_mtp.data.tokenizer import DocumentEncoder

PYTHON = (
    *("name", "keyword", "operator", "string", "number", "comment", "indent", "space"),
    *("end of text", "not read"),
)
CHARACTERS = ("letters", "digits", "punctuation", "white space", "other", "end of text")
CORPORA = ("pystdlib", "sitelib")  # of Python files
LONGEST = 2**20  # tokens of a document that Python's tokenizer is given
Read = Callable[[np.ndarray, DocumentEncoder], np.ndarray]


def is_python(path: str) -> bool:
    """A prepared folder that was made of Python files alone."""
    if not Path(path).is_dir():
        return False
    arguments = read_folder_index(Path(path)).get("arguments", {})
    inputs = arguments.get("inputs") or []
    of_files = bool(inputs) and all(str(name).endswith(".py") for name in inputs)
    return of_files or arguments.get("corpus") in CORPORA


def target_classes(
    source: Source, starts: Sequence[int], length: int, encoder: DocumentEncoder
) -> tuple[tuple[str, ...], np.ndarray]:
    """The names of the classes, and (W, T) which of them t_{j+1} of each window is.

    starts: where in the source, in natural order, each window of `length` slots begins.
    """
    python = is_python(source.path)
    names, read = (PYTHON, python_classes) if python else (CHARACTERS, character_classes)
    found = np.zeros((len(starts), length), np.int64)
    of_document: dict[int, np.ndarray] = {}
    for row, start in enumerate(starts):
        for place in range(length):
            position = (start + 1 + place) % source.tokens
            document = int(np.searchsorted(source.document_starts, position, side="right")) - 1
            begin, end = source.document_starts[document : document + 2]
            if document not in of_document:
                of_document[document] = _of_document(source, int(begin), int(end), encoder, read)
            found[row, place] = of_document[document][position - begin]
    return names, found


def _of_document(
    source: Source, begin: int, end: int, encoder: DocumentEncoder, read: Read
) -> np.ndarray:
    if read is python_classes and end - begin > LONGEST:
        return np.full(end - begin, PYTHON.index("not read"))
    return read(source.read(begin, end), encoder)


def character_classes(ids: np.ndarray, encoder: DocumentEncoder) -> np.ndarray:
    """(n,) number of CHARACTERS of every token of a document."""
    kinds = {int(token): _kind(int(token), encoder) for token in np.unique(ids)}
    return np.array([CHARACTERS.index(kinds[int(token)]) for token in ids])


def _kind(token: int, encoder: DocumentEncoder) -> str:
    if token == encoder.eos_id:
        return "end of text"
    text = encoder.tokenizer.decode([token], skip_special_tokens=False)
    first = next((c for c in text if not c.isspace()), None)
    if first is None:
        return "white space" if text else "other"
    if first.isdigit():
        return "digits"
    if first.isalpha():
        return "letters"
    return "punctuation" if first.isascii() and first.isprintable() else "other"


def python_classes(ids: np.ndarray, encoder: DocumentEncoder) -> np.ndarray:
    """(n,) number of PYTHON of every token of a document."""
    found = np.full(len(ids), PYTHON.index("not read"))
    ended = len(ids) > 0 and int(ids[-1]) == encoder.eos_id
    if ended:
        found[-1] = PYTHON.index("end of text")
    if (read := python_text(ids[: len(ids) - ended], encoder)) is not None:
        text, codes, offsets = read
        for place, (begin, end) in enumerate(offsets):
            found[place] = _decide(text[begin:end], codes[begin:end])
    return found


def python_text(
    body: np.ndarray, encoder: DocumentEncoder
) -> tuple[str, np.ndarray, list[tuple[int, int]]] | None:
    """Text of a document's tokens, number of PYTHON of each character, and begin and end of each
    token. None: its text gives other tokens, or Python's tokenizer cannot read it.
    """
    text = encoder.tokenizer.decode(body.tolist(), skip_special_tokens=False)
    again = encoder.tokenizer.encode(text, add_special_tokens=False)
    codes = character_codes(text)
    return None if again.ids != body.tolist() or codes is None else (text, codes, again.offsets)


def _decide(text: str, codes: np.ndarray) -> int:
    for place, character in enumerate(text):
        if not character.isspace():
            return int(codes[place])
    indent = PYTHON.index("indent")
    return indent if not len(codes) or (codes == indent).any() else int(codes[0])


def character_codes(text: str) -> np.ndarray | None:
    """(characters,) number of PYTHON of each character; None: Python's tokenizer cannot read it."""
    lines = list(io.StringIO(text, newline=""))  # \n, \r\n and \r end a line, as in Python
    starts = np.cumsum([0, *(len(line) for line in lines)])
    codes = np.full(len(text), PYTHON.index("space"))
    try:
        for kind, (first, column), (last, stop) in _tokens(lines):
            begin, end = starts[first - 1] + column, starts[last - 1] + stop
            codes[begin:end] = PYTHON.index(kind)
            line = lines[first - 1][:column]
            if not line.strip(" \t\f"):  # what begins a line is white space alone
                codes[starts[first - 1] : begin] = PYTHON.index("indent")
    except (tokenize.TokenError, SyntaxError, IndexError):
        return None
    return codes


Place = tuple[int, int]  # row from 1, column from 0


def _tokens(lines: list[str]) -> Iterator[tuple[str, Place, Place]]:
    """Kind, start and end of what Python's tokenizer finds. Raises what it raises."""
    feed = iter(lines)
    for token in tokenize.generate_tokens(lambda: next(feed, "")):
        name = tokenize.tok_name[token.type]
        if name == "ERRORTOKEN" and token.string.strip():
            raise SyntaxError(token.string)
        if token.start[0] > len(lines):  # the end of the file
            continue
        if name == "NAME":
            yield "keyword" if keyword.iskeyword(token.string) else "name", token.start, token.end
        elif name in ("OP", "NUMBER", "COMMENT", "STRING") or name.startswith("FSTRING"):
            kinds = {"OP": "operator", "NUMBER": "number", "COMMENT": "comment"}
            yield kinds.get(name, "string"), token.start, token.end
        elif name in ("NEWLINE", "NL", "INDENT"):
            yield "indent", token.start, token.end
