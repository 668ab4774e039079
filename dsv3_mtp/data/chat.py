"""Records with questions and answers as pieces of text; only the answers are targets
(`prepare --mask prompts`).

    {"prompt": "2+2=", "completion": "4"}
    {"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]}

Chats need the template of the tokenizer. It is rendered once with a mark in the place of each
content, so that the template's own special tokens are read as such, and text that looks like one
inside a content stays plain characters.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dsv3_mtp.files.checked import read_json

MARK = re.compile("\ue000(\\d+)\ue001")  # private use: in no text that a template writes
ANSWERS = "assistant"
PLACES = "chat_template.jinja, or the key chat_template of tokenizer_config.json"


@dataclass(frozen=True, slots=True)
class Piece:
    """Consecutive text of a document, tokenised apart from its neighbours, as a prompt is."""

    text: str
    scored: bool  # its tokens are targets
    special: bool = False  # written by a template: special tokens in it are special


class ChatTemplate:
    """The Jinja template beside a tokenizer.json. Raises ValueError: it is none."""

    def __init__(self, source: str, path: Path, tokens: dict[str, str]) -> None:
        """tokens: bos_token, eos_token, ..., which templates name."""
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = _refuse
        self.source, self.path, self.tokens = source, path, tokens
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise ValueError(f"{path}: not a Jinja template ({error})") from None

    def render(self, messages: list[dict[str, Any]], *, answer_follows: bool, place: str) -> str:
        """The text, with marks for contents; answer_follows: up to where the answer begins."""
        from jinja2 import TemplateError

        marked = [m | {"content": f"\ue000{i}\ue001"} for i, m in enumerate(messages)]
        names = {"messages": marked, "add_generation_prompt": answer_follows}
        try:
            return self._template.render(**names, **self.tokens)
        except (TemplateError, TypeError, ValueError) as error:
            raise ValueError(f"{place}: {self.path} refuses these messages: {error}") from None

    def pieces(
        self, messages: Any, *, place: str, specials: frozenset[str], answer_follows: bool = False
    ) -> tuple[Piece, ...]:
        """The pieces of a chat. Targets are what the assistant says and the special token that the
        template writes behind it, which ends the turn.

        specials: the tokenizer's special tokens.

        Raises:
            ValueError: no list of messages, or the template leaves a message out or repeats it.
        """
        chat = _checked(messages, place)
        text = self.render(chat, answer_follows=answer_follows, place=place)
        parts = MARK.split(text)  # template, number, template, number, ..., template
        numbers = [int(number) for number in parts[1::2]]
        if numbers != list(range(len(chat))):
            raise ValueError(
                f"{place}: {self.path} writes the contents of messages {numbers}, there are "
                f"{len(chat)}: each must stand in the text once and in order"
            )
        pieces = [Piece(parts[0], scored=False, special=True)]
        for message, behind in zip(chat, parts[2::2], strict=True):
            scored = message["role"] == ANSWERS and not answer_follows
            pieces.append(Piece(message["content"], scored))
            end = next((s for s in specials if behind.startswith(s)), "") if scored else ""
            pieces.append(Piece(end, scored=True, special=True))
            pieces.append(Piece(behind[len(end) :], scored=False, special=True))
        return tuple(piece for piece in pieces if piece.text)


def read_template(tokenizer: Path) -> ChatTemplate | None:
    """The template beside a tokenizer.json, None if there is none. Raises ValueError:
    tokenizer_config.json is damaged, or the template is none.
    """
    beside, content = tokenizer.with_name("tokenizer_config.json"), dict[str, Any]()
    if beside.is_file():
        content = read_json(beside, dict[str, Any], "take it from where the tokenizer came from")
    tokens: dict[str, str] = {}
    for key, value in content.items():
        if key.endswith("_token"):
            text = value.get("content") if isinstance(value, dict) else value
            tokens |= {key: text} if isinstance(text, str) else {}
    own = tokenizer.with_name("chat_template.jinja")
    if own.is_file():
        return ChatTemplate(own.read_text(encoding="utf-8"), own, tokens)
    source = content.get("chat_template")
    if isinstance(source, list):  # several, by name
        named = {entry.get("name"): entry.get("template") for entry in source}
        source = named.get("default")
    return ChatTemplate(source, beside, tokens) if isinstance(source, str) else None


def record_pieces(
    record: Any, template: ChatTemplate | None, *, specials: frozenset[str], place: str
) -> tuple[Piece, ...]:
    """The pieces of a JSON record with `prompt` and `completion`, or with `messages`. Raises
    ValueError: it has neither, a part of it is no text, nothing in it is an answer, or `messages`
    without a template.
    """
    if not isinstance(record, dict):
        raise ValueError(f"{place}: is a JSON {type(record).__name__}, must be an object")
    if "messages" in record:
        if template is None:
            raise ValueError(
                f"{place}: has messages, but no chat template stands beside the tokenizer "
                f"({PLACES}); put it there, or give prompt and completion"
            )
        pieces = template.pieces(record["messages"], place=place, specials=specials)
    elif {"prompt", "completion"} <= record.keys():
        texts = [_text(record[key], f"{place}: {key!r}") for key in ("prompt", "completion")]
        pieces = tuple(Piece(text, bool(n)) for n, text in enumerate(texts) if text)
    else:
        raise ValueError(
            f"{place}: has only {sorted(record)}; --mask prompts reads the keys prompt and "
            "completion, or messages"
        )
    if not any(piece.scored for piece in pieces):
        raise ValueError(f"{place}: holds no answer, so that nothing in it is a target")
    return pieces


def prompt_pieces(
    record: Any, template: ChatTemplate | None, *, specials: frozenset[str], place: str
) -> tuple[Piece, ...]:
    """The pieces in front of an answer that is to be generated: of `prompt`, or of `messages` up to
    the last one that is not the assistant's. Raises ValueError: as `record_pieces`; or nothing is
    left.
    """
    if isinstance(record, dict) and "messages" in record and template is not None:
        chat = list(_checked(record["messages"], place))
        while chat and chat[-1]["role"] == ANSWERS:
            chat.pop()
        if chat:
            return template.pieces(chat, place=place, specials=specials, answer_follows=True)
    elif isinstance(record, dict) and "messages" not in record and "prompt" in record:
        if text := _text(record["prompt"], f"{place}: 'prompt'"):
            return (Piece(text, scored=False),)
    elif isinstance(record, dict) and "messages" in record:
        raise ValueError(f"{place}: has messages, but the run has no chat template ({PLACES})")
    raise ValueError(f"{place}: holds no prompt; the key prompt, or messages of a user, is needed")


def join(pieces: list[tuple[list[int], bool]]) -> tuple[np.ndarray, np.ndarray]:
    """(token ids, scored) of each piece -> ids (n,) int64 and scored (n,) bool."""
    ids = [token for tokens, _ in pieces for token in tokens]
    scored = [flag for tokens, flag in pieces for _ in tokens]
    return np.array(ids, np.int64), np.array(scored, np.bool_)


def _checked(messages: Any, place: str) -> list[dict[str, Any]]:
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{place}: messages must be a list of messages")
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ValueError(f"{place}: message {number} has no role")
        _text(message.get("content"), f"{place}: the content of message {number}")
    return messages


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{what} is {type(value).__name__}, must be a string")
    if MARK.search(value) or any("\ud800" <= letter <= "\udfff" for letter in value):
        raise ValueError(f"{what} holds characters that are no text (surrogates or U+E000 marks)")
    return value


def _refuse(message: str) -> None:
    """What templates call for messages that they do not take."""
    raise ValueError(message)
