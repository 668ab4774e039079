"""The special tokens that config.json names."""

from collections.abc import Iterator
from typing import Any

SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def special_problems(content: dict[str, Any]) -> Iterator[str]:
    """Each special token is an id, several of them, or null."""
    size = content.get("vocab_size")
    for key in SPECIAL_IDS:
        value = content.get(key)
        ids = [] if value is None else value if isinstance(value, list) and value else [value]
        for one in ids:
            if type(one) is not int or one < 0 or (type(size) is int and one >= size):
                text = f"must be token ids below vocab_size = {size}, or null"
                yield f"{key}: {text} (got {value!r:.60})"
                break
