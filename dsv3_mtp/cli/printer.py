"""Generated tokens as text while they come: accepted drafts marked, in a terminal after the prompt.

Piped, stdout is the continuation alone, and with `--show-drafts` its marks.
"""

import os
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

ECHOED = 200  # letters at the end of a prompt that a terminal shows


class Marks(NamedTuple):
    """What stands around the text of a prompt and of each accepted draft, and what it means."""

    prompt: tuple[str, str] | None  # None: the prompt is not shown
    draft: tuple[str, str]
    legend: str


DIM, GREEN, PLAIN = "\x1b[2m", "\x1b[32m", "\x1b[0m"
COLOURS = Marks((DIM, PLAIN), (GREEN, PLAIN), "green: accepted drafts")
SIGNS = Marks(None, ("«", "»"), "« »: accepted drafts")
NONE = Marks(None, ("", ""), "")


def marks(*, drafts: bool) -> Marks:
    """For stdout as it is: colours in a terminal that has them. drafts: show the accepted ones."""
    terminal = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
    if terminal and not os.environ.get("NO_COLOR"):
        return COLOURS if drafts else COLOURS._replace(draft=("", ""), legend="")
    return SIGNS if drafts else NONE


class Printer:
    """Token ids to text as it grows; bytes of an unfinished character wait for the rest."""

    def __init__(self, encoder: Any, marks: Marks):
        self.encoder, self.marks = encoder, marks
        self.ids: list[int] = []
        self.text = ""

    def opening(self, prompt: Sequence[int]) -> str:
        """The end of the prompt, where it is shown."""
        if self.marks.prompt is None or self.encoder is None:
            return ""
        text = self.encoder.tokenizer.decode(list(prompt), skip_special_tokens=False)
        start, end = self.marks.prompt
        return f"{start}{'...' if len(text) > ECHOED else ''}{text[-ECHOED:]}{end}"

    def push(self, tokens: Sequence[int], accepted: int, *, done: bool) -> str:
        """What to print for new tokens, of which the first `accepted` were drafts. done: nothing
        comes after them.
        """
        out = ""
        start, end = self.marks.draft
        for number, token in enumerate(tokens):
            self.ids.append(token)
            if self.encoder is None:
                piece = f"{token} "
            else:
                text = self.encoder.tokenizer.decode(self.ids, skip_special_tokens=False)
                if text.endswith("\ufffd") and not (done and number == len(tokens) - 1):
                    continue
                piece, self.text = text[len(self.text) :], text
            out += f"{start}{piece}{end}" if number < accepted else piece
        return out
