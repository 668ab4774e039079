"""Text to token shards for training. Interrupted, the same command goes on where it stopped.

Examples:
    python tools/prepare_data.py --out data/pystdlib-2048 --corpus pystdlib --vocab-size 2048
    python tools/prepare_data.py --out data/sitelib-512 --corpus sitelib --vocab-size 512
    python tools/prepare_data.py --out data/web --input 'web/*.jsonl.zst' --tokenizer tokenizer.json
    python tools/prepare_data.py --out data/chats --input chats.jsonl --mask prompts --tokenizer T/tokenizer.json
    python tools/prepare_data.py --verify data/web
"""

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def main() -> int:
    options = parse()
    if options.workers is not None:
        # read by tokenizers at its first use
        os.environ["RAYON_NUM_THREADS"] = str(options.workers)
    from dsv3_mtp.data.prepare import Arguments, prepare
    from dsv3_mtp.data.shards import verify_folder

    if options.from_run is not None or options.prompts is not None:
        return write_answers_of(options)
    names = Arguments.__dataclass_fields__
    values = {
        key: value for key, value in vars(options).items() if key in names and value is not None
    }
    try:
        if options.verify is not None:
            verify_folder(Path(options.verify))
            print(f"{options.verify}: all checksums are right")
            return 0
        with progress_display() as progress:
            index = prepare(options.out, Arguments(**values), progress=progress)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            f"\ninterrupted; the same command goes on from {options.out}.partial", file=sys.stderr
        )
        return 130
    for split, entry in index["splits"].items():
        counts = (
            f"{entry['tokens']:,} tokens in {entry['documents']:,} "
            f"documents of {entry['bytes']:,} bytes"
        )
        print(f"{options.out} {split}: {counts}, {len(entry['shards'])} shards")
    return 0


def write_answers_of(options: argparse.Namespace) -> int:
    """`--from-run`: exit code."""
    from dsv3_mtp.train.answers import AnswerArguments, write_answers

    given = {key: value for key, value in vars(options).items() if value is not None}
    given |= {"run": given.pop("from_run", None)}
    given.pop("workers", None)
    out, allowed = given.pop("out"), set(AnswerArguments.__dataclass_fields__)
    try:
        if given["run"] is None or "prompts" not in given:
            raise ValueError("--from-run RUN and --prompts FILE go together")
        if other := [key.replace("_", "-") for key in given if key not in allowed]:
            raise ValueError(f"--{other[0]} does not go with --from-run")

        def report(done: int, total: int, tokens: int) -> None:
            print(f"{done:,} of {total:,} prompts, {tokens:,} tokens", file=sys.stderr, flush=True)

        index = write_answers(out, AnswerArguments(**given), progress=report)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\ninterrupted; the same command goes on from {out}.partial", file=sys.stderr)
        return 130
    for split, entry in index["splits"].items():
        print(
            f"{out} {split}: {entry['documents']:,} answers, {entry['scored_tokens']:,} targets of "
            f"{entry['tokens']:,} tokens"
        )
    print("next: set data.train and data.val to it, and data.mask: prompts")
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--out", metavar="DIR", help="folder to make")
    target.add_argument(
        "--verify",
        metavar="DIR",
        help="compare the files of a prepared folder with their checksums",
    )
    answers = parser.add_argument_group("text that a run writes itself, instead of files")
    answers.add_argument("--from-run", metavar="RUN", help="whose main model answers")
    answers.add_argument(
        "--prompts",
        metavar="FILE",
        help=".jsonl with {prompt} or {messages}; of any other file each line is a prompt",
    )
    answers.add_argument(
        "--max-new-tokens", type=int, metavar="N", help="longest answer (default: 512)"
    )
    answers.add_argument(
        "--temperature", type=float, metavar="X", help="of the answers (default: 1)"
    )
    answers.add_argument("--top-p", type=float, metavar="P", help="of the answers (default: 1)")
    answers.add_argument(
        "--batch", type=int, metavar="N", help="prompts answered together (default: 32)"
    )
    text = parser.add_argument_group("text")
    text.add_argument(
        "--corpus",
        choices=["pystdlib", "sitelib"],
        help="pystdlib: the standard library of this Python; sitelib: that and its site-packages",
    )
    text.add_argument(
        "--input",
        dest="inputs",
        nargs="+",
        metavar="X",
        help="files, folders, globs: .jsonl[.gz|.zst], "
        ".parquet, folders of datasets.save_to_disk (a "
        "document per record); any other file is one document of UTF-8 text",
    )
    text.add_argument(
        "--text-key", metavar="KEY", help="key or column that holds the text (default: text)"
    )
    text.add_argument(
        "--mask",
        choices=["prompts"],
        help="records are {prompt, completion} or {messages}: only answers are targets",
    )
    text.add_argument(
        "--val-fraction",
        type=float,
        metavar="F",
        help="share of val documents, by hash (default: 0.1)",
    )
    tokens = parser.add_argument_group("tokens")
    tokens.add_argument("--tokenizer", metavar="FILE", help="a Hugging Face tokenizer.json")
    tokens.add_argument(
        "--vocab-size", type=int, metavar="N", help="train a byte-level BPE with N tokens instead"
    )
    tokens.add_argument(
        "--eos", metavar="TOKEN", help="end-of-text token (default: the first common one it has)"
    )
    tokens.add_argument(
        "--fim-rate",
        type=float,
        metavar="P",
        help="share of train documents made fill-in-the-middle (default: 0)",
    )
    tokens.add_argument(
        "--shard-tokens", type=int, metavar="N", help="tokens per shard (default: 100,000,000)"
    )
    tokens.add_argument(
        "--seed", type=int, metavar="N", help="of the fill-in-the-middle cuts (default: 0)"
    )
    parser.add_argument(
        "--workers", type=int, metavar="N", help="tokenizer threads (default: all cores)"
    )
    options = parser.parse_args()
    if options.verify is not None and (
        unused := [
            key for key, value in vars(options).items() if key != "verify" and value is not None
        ]
    ):
        parser.error(
            "--verify checks a folder as it is; it does "
            f"not go with --{unused[0].replace('_', '-')}"
        )
    if options.workers is not None and options.workers < 1:
        parser.error(f"--workers {options.workers}: must be at least 1")
    if options.inputs is not None:
        options.inputs = tuple(options.inputs)
    return options


@contextlib.contextmanager
def progress_display() -> Iterator[Any]:
    """A function (bytes done, bytes in all, tokens): a bar on a terminal, else a line every ten
    seconds.
    """
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
        yield lambda done, total, tokens: bar.update(
            task, completed=done, total=total, tokens=tokens
        )


if __name__ == "__main__":
    sys.exit(main())
