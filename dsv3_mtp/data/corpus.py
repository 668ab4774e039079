"""The embedded corpus, in one call."""

from pathlib import Path
from typing import Any

from dsv3_mtp.data.prepare import Arguments, prepare


def build_corpus(
    out_dir: str | Path, *, vocab_size: int, shard_tokens: int = Arguments.shard_tokens, seed: int = 0
) -> dict[str, Any]:
    """Prepare pystdlib with a tokenizer of exactly `vocab_size`, trained on its train split; returns its
    index.

    Takes seconds and is deterministic. Safe to call from several processes: one builds, the others wait.
    Returns at once when `out_dir` is already that; raises ValueError when it is something else, or when this
    Python has no sources.
    """
    return prepare(out_dir, Arguments(corpus="pystdlib", vocab_size=vocab_size, shard_tokens=shard_tokens, seed=seed))
