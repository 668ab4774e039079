"""How often each token occurs in a run's training text: token_counts.json in its folder.

Counted when it is first asked for, and read from then on, also where the data is no longer at hand.
FastMTP (arXiv 2509.18362) drafts among the most frequent tokens only: the draft's output head, the
largest product of a draft, shrinks with them.
"""

from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import Field, with_config
from typing_extensions import TypedDict

from dsv3_mtp.config import Config
from dsv3_mtp.data.opening import open_sources
from dsv3_mtp.data.source import Source
from dsv3_mtp.files.atomic import write_json
from dsv3_mtp.files.checked import OPEN, read_json
from dsv3_mtp.files.format import FORMAT, check_format
from dsv3_mtp.runs.folder import MANIFEST, Manifest

FILE = "token_counts.json"
BLOCK = 2**22  # tokens read at a time


@with_config(OPEN)
class SourceCounts(TypedDict):
    """Of one source of text."""

    manifest_hash: str
    weight: float  # its share of the samples
    counts: list[Annotated[int, Field(ge=0)]]  # (V,) how often a token is a target


@with_config(OPEN)
class TokenCounts(TypedDict):
    """token_counts.json."""

    format: int
    sources: Annotated[list[SourceCounts], Field(min_length=1)]


def most_frequent(folder: Path, config: Config, size: int) -> tuple[int, ...]:
    """The `size` tokens that are the most frequent targets of the run's training text, sources by
    their share of the samples, in rising order; of equally frequent ones those of lower id. Raises
    ValueError: size is not in 1 .. vocab_size, the run is trained on a generated task, or the
    counts, or the text to count, are not those of the run.
    """
    vocab = config.model.vocab_size
    if not 1 <= size <= vocab:
        text = f"1 .. model.vocab_size = {vocab} tokens (got {size})"
        raise ValueError(f"a draft vocabulary has {text}")
    path = folder / FILE
    if not path.exists():
        write_json(path, {"format": FORMAT, "sources": _count(config)})
    remedy = "delete it, and it is counted again"
    found = read_json(path, TokenCounts, remedy)
    check_format(found, path)
    if any(len(source["counts"]) != vocab for source in found["sources"]):
        raise ValueError(f"{path}: not of a vocabulary of {vocab} tokens; {remedy}")
    known = _recorded(folder)
    if known and not {source["manifest_hash"] for source in found["sources"]} <= known:
        raise ValueError(f"{path}: counted from other data than {folder} is trained on; {remedy}")
    share = np.zeros(vocab)
    for source in found["sources"]:
        counts = np.array(source["counts"], np.float64)
        share += source["weight"] * counts / max(counts.sum(), 1)
    return tuple(sorted(np.argsort(-share, kind="stable")[:size].tolist()))


def _count(config: Config) -> list[SourceCounts]:
    if config.data.task is not None:
        task = config.data.task.type
        raise ValueError(f"data.task {task}: a task has no text to count tokens in")
    sampler, _ = open_sources(config)
    return [
        {"manifest_hash": text.manifest_hash, "weight": weight, "counts": _counts(text, config)}
        for source, weight in zip(sampler.sources, sampler.weights, strict=True)
        if (text := source.text) is not None
    ]


def _counts(text: Source, config: Config) -> list[int]:
    """(V,) of the targets of one source."""
    counts = np.zeros(config.model.vocab_size, np.int64)
    for start in range(0, text.tokens, BLOCK):
        stop = min(start + BLOCK, text.tokens)
        tokens = text.read(start, stop)[text.read_scored(start, stop)]
        counts += np.bincount(tokens, minlength=len(counts))
    return counts.tolist()


def _recorded(folder: Path) -> set[str]:
    """Hashes of the data of the run's newest start; none where no start is recorded."""
    path = folder / MANIFEST
    if not path.exists():
        return set()
    manifest = read_json(path, Manifest, "restore it from a copy of the run")
    return {used["manifest_hash"] for used in manifest["starts"][-1]["data"].values()}
