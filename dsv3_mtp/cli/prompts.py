"""Prompts of `dsv3 generate`: from options, files, token ids or stdin."""

import argparse
import sys
from pathlib import Path
from typing import Any

LETTERS = 100  # per token: no text of a language has so many


def read_prompts(
    options: argparse.Namespace, encoder: Any, longest: int
) -> tuple[list[str], list[list[int]]]:
    """What to call each prompt, and its token ids. longest: tokens that the model reads."""
    texts = [(f"prompt {text!r}", text) for text in options.prompt]
    for path in options.prompt_file:
        try:
            texts.append((path, Path(path).read_text(encoding="utf-8")))
        except (OSError, UnicodeDecodeError) as error:
            why = getattr(error, "strerror", None) or "not UTF-8 text"
            raise ValueError(f"--prompt-file {path}: {why}") from None
    if not texts and not options.prompt_ids:
        texts = [("stdin", sys.stdin.read())]
    for name, text in texts:
        # how Python passes on bytes that are none
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            raise ValueError(f"{name}: not UTF-8 text")
    if texts and encoder is None:
        text = "the checkpoint's data has no tokenizer.json here: give the prompt with --prompt-ids"
        raise ValueError(text)
    for name, text in texts:
        if len(text) > LETTERS * longest:  # to make tokens of all of it would take minutes
            raise ValueError(
                f"{name[:60]}: {len(text):,} letters, more than {LETTERS} for each of the "
                f"{longest:,} tokens that the model reads (model.max_position_embeddings)"
            )
    prompts = [encoder.tokenizer.encode(text, add_special_tokens=False).ids for _, text in texts]
    names = [name for name, _ in texts]
    for ids in options.prompt_ids:
        try:
            prompts.append([int(word) for word in ids.replace(",", " ").split()])
        except ValueError:
            raise ValueError(f"--prompt-ids {ids!r}: must be whole numbers") from None
        names.append(f"prompt ids {ids}")
    return names, prompts
