"""What a run knows, beyond its means: by kind of token, by entropy, by place, and in its states.

    dsv3 analyse --run runs/v3_tiny
    dsv3 analyse --run runs/v3_tiny --against runs/no_heads

Loss and overlap by the class of the token (of Python code name, operator, string, ...), by the
entropy of the main head and by the slot in the window; linear probes for t+2 .. t+4 from the
trunk's states; experts that trunk and MTP modules share; the angle of their gradients over
training. Every number has a 95 % interval over windows, and stands beside its floor: a trigram
table, a table drafter, a table of t_i, independent routers (docs/analyse.md).

With --against the same is read from another run on the same windows, and the differences of the
losses are given, paired by window. Written into the run's folder: analysis.json and analysis.png.

Exit codes: 0 done, 2 a run or its data cannot be used.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from dsv3_mtp.cli.command import add_run_options, add_window_options


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--run", required=True, metavar="RUN", help="run folder: its newest checkpoint")
    add("--against", metavar="RUN", help="another run, read on the same windows")
    text = "prepared folder or Megatron prefix (default: the run's own)"
    add("--data", metavar="DIR", help=text)
    text = " of windows (default: the run's eval.batches)"
    add_window_options(parser, split="of a prepared folder", batches=text)
    add_run_options(parser)
    add("--json", action="store_true", help="print analysis.json, not tables")


def run(options: argparse.Namespace) -> None:
    import torch

    from dsv3_mtp.analysis.analyse import analyse, as_json
    from dsv3_mtp.analysis.picture import draw
    from dsv3_mtp.analysis.words import tables
    from dsv3_mtp.files.atomic import write_text
    from dsv3_mtp.ops.tuning import tune

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tune(device)
    subject = opened(options.run, options, device)
    other = opened(options.against, options, device) if options.against else None
    source, batches = text_of(subject, other, options), options.batches
    batches = batches or subject.config.eval.batches
    reading = f"reading {batches} batches of {source.path}, and other windows to fit probes on"
    print(reading, file=sys.stderr)
    found = analyse(
        subject, other, source, batches=batches, device=device, trust_code=options.trust_code
    )
    content = json.dumps(as_json(found), indent=1)
    write_text(subject.folder / "analysis.json", content + "\n")
    draw(found, subject.folder / "analysis.png")
    print(f"wrote analysis.json and analysis.png to {subject.folder}", file=sys.stderr)
    print(content if options.json else tables(found))


def opened(folder: str, options: argparse.Namespace, device: Any) -> Any:
    """A run as `analyse` takes it."""
    from dsv3_mtp.analysis.analyse import Subject
    from dsv3_mtp.train.validation import open_model

    own: Any = {"hf": None, "seq_len": None, "micro_batch_size": None}
    model, config = open_model(run=folder, **own, ema=options.ema, trust_code=options.trust_code)
    return Subject(Path(folder), model.to(device), config)


def text_of(subject: Any, other: Any, options: argparse.Namespace) -> Any:
    """The text to read. Raises ValueError: it is none, or of another tokenizer than a run's."""
    from dsv3_mtp.data.opening import validation_source
    from dsv3_mtp.data.source import check_tokenizers, check_vocab, open_source, tokenizer_sha256
    from dsv3_mtp.files.run_folder import tokenizer_of

    if options.data:
        source: Any = open_source(options.data, options.split)
    else:
        source = validation_source(subject.config, options.split).text
    if source is None:
        raise ValueError(
            f"{subject.folder}: what it is validated on is no text that can be read by position; "
            "name a prepared folder with --data"
        )
    made = [(source.path, source.tokenizer_sha256)]
    for one in (subject, other):
        if one is not None:
            check_vocab(source, one.config.model.vocab_size)
            own = tokenizer_sha256(tokenizer_of(one.config, one.folder))
            made.append((str(one.folder), own))
    check_tokenizers(made)
    return source
