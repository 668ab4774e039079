"""Text to token shards for training. Interrupted, the same command goes on where it stopped.

Examples:
    dsv3 prepare --out data/pystdlib-2048 --corpus pystdlib --vocab-size 2048
    dsv3 prepare --out data/sitelib-512 --corpus sitelib --vocab-size 512
    dsv3 prepare --out data/web --input 'web/*.jsonl.zst' --tokenizer tokenizer.json
    dsv3 prepare --out data/chats --input chats.jsonl --mask prompts --tokenizer DIR/tokenizer.json
    dsv3 prepare --out data/own --from-run runs/head --prompts prompts.jsonl
    dsv3 prepare --verify data/web
"""

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dsv3_mtp.cli.command import at_least


def add_options(parser: argparse.ArgumentParser) -> None:
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--out", metavar="DIR", help="folder to make")
    text = "compare the files of a prepared folder with their checksums"
    target.add_argument("--verify", metavar="DIR", help=text)
    _add_answers(parser.add_argument_group("text that a run writes itself, instead of files"))
    _add_text(parser.add_argument_group("text"))
    _add_tokens(parser.add_argument_group("tokens"))
    text = "tokenizer threads (default: all cores)"
    parser.add_argument("--workers", type=at_least(1), metavar="N", help=text)


def _add_answers(group: Any) -> None:
    add = group.add_argument
    add("--from-run", metavar="RUN", help="whose main model answers")
    text = ".jsonl with {prompt} or {messages}; of any other file each line is a prompt"
    add("--prompts", metavar="FILE", help=text)
    add("--max-new-tokens", type=int, metavar="N", help="longest answer (default: 512)")
    add("--temperature", type=float, metavar="X", help="of the answers (default: 1)")
    add("--top-p", type=float, metavar="P", help="of the answers (default: 1)")
    add("--batch", type=int, metavar="N", help="prompts answered together (default: 32)")


def _add_text(group: Any) -> None:
    add, flag = group.add_argument, {"action": "store_true", "default": None}
    text = "pystdlib: the standard library of this Python; sitelib: that and its site-packages"
    add("--corpus", choices=["pystdlib", "sitelib"], help=text)
    text = (
        "files, folders, globs: .jsonl[.gz|.zst], .parquet, folders of datasets.save_to_disk (a "
        "document per record); any other file is one document of UTF-8 text"
    )
    add("--input", dest="inputs", nargs="+", metavar="X", help=text)
    add("--text-key", metavar="KEY", help="key or column that holds the text (default: text)")
    text = "records are {prompt, completion} or {messages}: only answers are targets"
    add("--mask", choices=["prompts"], help=text)
    text = "share of val documents, by hash (default: 0.1)"
    add("--val-fraction", type=float, metavar="F", help=text)
    text = "the end of every text file is val instead, --val-fraction of it: for one long file"
    add("--val-by-position", **flag, help=text)
    text = "leave out files that are no UTF-8 text, and say how many"
    add("--skip-unreadable", **flag, help=text)


def _add_tokens(group: Any) -> None:
    add = group.add_argument
    add("--tokenizer", metavar="FILE", help="a Hugging Face tokenizer.json")
    text = "train a byte-level BPE with N tokens instead"
    add("--vocab-size", type=int, metavar="N", help=text)
    add("--eos", metavar="TOKEN", help="end-of-text token (default: the first common one it has)")
    text = "share of train documents made fill-in-the-middle (default: 0)"
    add("--fim-rate", type=float, metavar="P", help=text)
    add("--shard-tokens", type=int, metavar="N", help="tokens per shard (default: 100,000,000)")
    add("--seed", type=int, metavar="N", help="of the fill-in-the-middle cuts (default: 0)")


def check(options: argparse.Namespace) -> str | None:
    given = [key for key, value in vars(options).items() if key != "verify" and value is not None]
    if options.verify is not None and given:
        name = given[0].replace("_", "-")
        return f"--verify checks a folder as it is; it does not go with --{name}"
    own = {"from_run", "prompts", "max_new_tokens", "temperature", "top_p", "batch"}
    if options.from_run is None and (alone := sorted(own.intersection(given))):
        return f"--{alone[0].replace('_', '-')} goes with --from-run"
    if options.from_run is not None:
        if options.prompts is None:
            return "--from-run needs --prompts FILE"
        shared = own | {"out", "seed", "val_fraction", "shard_tokens", "workers"}
        if other := sorted(set(given) - shared):
            return f"--from-run: the run has its own text; drop --{other[0].replace('_', '-')}"
    return None


def run(options: argparse.Namespace) -> None:
    if options.workers is not None:
        # read by tokenizers at its first use
        os.environ["RAYON_NUM_THREADS"] = str(options.workers)
    from dsv3_mtp.data.prepare import Arguments, prepare
    from dsv3_mtp.data.shards import verify_folder

    if options.verify is not None:
        verify_folder(Path(options.verify))
        print(f"{options.verify}: all checksums are right")
        return
    if options.from_run is not None:
        return write_answers_of(options)
    values = given(options, Arguments)
    if options.inputs is not None:
        values["inputs"] = tuple(options.inputs)
    try:
        with progress_display() as progress:
            arguments = Arguments(**values)
            index = prepare(options.out, arguments, progress=progress, say=say)
    except KeyboardInterrupt:
        text = f"interrupted; the same command goes on from {options.out}.partial"
        raise KeyboardInterrupt(text) from None
    for split, entry in index["splits"].items():
        documents = f"{entry['documents']:,} documents of {entry['bytes']:,} bytes"
        counts = f"{entry['tokens']:,} tokens in {documents}"
        print(f"{options.out} {split}: {counts}, {len(entry['shards'])} shards")


def given(options: argparse.Namespace, kind: Any) -> dict[str, Any]:
    """The options that were given and are fields of a dataclass."""
    fields = kind.__dataclass_fields__
    return {k: value for k, value in vars(options).items() if k in fields and value is not None}


def write_answers_of(options: argparse.Namespace) -> None:
    """`--from-run`."""
    from dsv3_mtp.train.answers import AnswerArguments, write_answers

    def report(done: int, total: int, tokens: int) -> None:
        print(f"{done:,} of {total:,} prompts, {tokens:,} tokens", file=sys.stderr, flush=True)

    try:
        arguments = AnswerArguments(run=options.from_run, **given(options, AnswerArguments))
        index = write_answers(options.out, arguments, progress=report)
    except KeyboardInterrupt:
        text = f"interrupted; the same command goes on from {options.out}.partial"
        raise KeyboardInterrupt(text) from None
    for split, entry in index["splits"].items():
        print(
            f"{options.out} {split}: {entry['documents']:,} answers, "
            f"{entry['scored_tokens']:,} targets of {entry['tokens']:,} tokens"
        )
    print("next: set data.train and data.val to it, and data.mask: prompts")


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def progress_display() -> Iterator[Any]:
    """A function (bytes done, bytes in all, tokens): a bar, or a line every ten seconds."""
    if not sys.stderr.isatty():
        shown = time.monotonic()

        def line(done: int, total: int, tokens: int) -> None:
            nonlocal shown
            if time.monotonic() > shown + 10:
                shown = time.monotonic()
                megabytes = f"{done / 1e6:,.1f} of {total / 1e6:,.1f} MB"
                print(f"{megabytes} read, {tokens:,} tokens", file=sys.stderr, flush=True)

        yield line
        return
    from rich import progress as rich_progress
    from rich.console import Console

    columns = [
        rich_progress.TextColumn("{task.fields[tokens]:,} tokens"),
        rich_progress.BarColumn(),
        rich_progress.DownloadColumn(),
        rich_progress.TransferSpeedColumn(),
        rich_progress.TimeRemainingColumn(),
    ]
    with rich_progress.Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("prepare", total=None, tokens=0)
        yield lambda done, total, n: bar.update(task, completed=done, total=total, tokens=n)
