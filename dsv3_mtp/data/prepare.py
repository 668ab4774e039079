"""Text to token shards: split, tokenise, write. Byte-identical however often it is interrupted.

Everything is written to DIR.partial, which becomes DIR with one rename at the end.
DIR.partial/progress.json says how far the shards on disk go; whatever was written after it is cut
off and made again. A lock beside them, .DIR.lock, lets a second process wait for the first.
"""

import itertools
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dsv3_mtp.data import shards
from dsv3_mtp.data.arguments import Arguments, compare, open_inputs, record
from dsv3_mtp.data.documents import Corpus, FileInputs, Inputs
from dsv3_mtp.data.megatron import token_dtype
from dsv3_mtp.data.shards import INDEX, FolderIndex, SplitWriter, file_sha256
from dsv3_mtp.data.tokenise import PROGRESS, ProgressCallback, Tokenising, TokenisingState
from dsv3_mtp.data.tokenizer import DocumentEncoder, load_encoder, train_tokenizer
from dsv3_mtp.files.atomic import lock, naming_file, replacing, sweep, sync, sync_tree, write_json
from dsv3_mtp.files.checked import read_json

TOKENIZER, MANIFEST = "tokenizer.json", "manifest.json"
# what a preparation writes into DIR.partial
OWN = re.compile(
    r"\.?(tokenizer|manifest|index|progress)\.json(\.\d+\.tmp)?|[a-z]+-\d+\.(bin|idx|sizes|scored)"
)
TRAIN_CHARACTERS = 256_000_000  # how much of the train split a new tokenizer is trained on


def prepare(
    out_dir: str | Path,
    arguments: Arguments,
    *,
    progress: ProgressCallback | None = None,
    say: Callable[[str], None] = print,
) -> FolderIndex:
    """Makes the prepared folder `out_dir`, or goes on where an interrupted call stopped.

    Returns its index.json. `say` is told what was left out.

    Raises:
        ValueError: bad input, by file and record; or `out_dir` or `out_dir`.partial were made with
            other arguments.
    """
    out = Path(out_dir)
    if not out.name:
        raise ValueError(f"{str(out_dir)!r}: names no folder to make; give --out one")
    inputs = open_inputs(arguments, out)
    recorded = record(arguments, inputs)

    def build(partial: Path) -> None:
        try:
            _build(partial, arguments, recorded, inputs, progress)
        except ValueError:  # with other arguments, as it advises, nothing of it would be of use
            if partial.is_dir() and not _begun(partial) and not _foreign(partial):
                shutil.rmtree(partial)
            raise

    index = make_folder(out, recorded, build)
    if isinstance(inputs, FileInputs) and (skipped := list(map(str, inputs.skipped))):
        more = ", ..." if len(skipped) > 3 else ""
        say(f"left out {len(skipped)} unreadable file(s): {', '.join(skipped[:3])}{more}")
    return index


def make_folder(out: Path, recorded: dict[str, Any], build: Callable[[Path], None]) -> FolderIndex:
    """The prepared folder `out`, which `build` makes in `out`.partial where it is not there yet.
    Raises ValueError: `out` was made with other arguments than `recorded`.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out}: is a file; name a folder that is to be made")
    partial = out.with_name(out.name + ".partial")
    if not _taken(out):
        locked = out.with_name(f".{out.name}.lock")
        descriptor = lock(locked, f"waiting for the process that holds {locked}", wait=True)
        try:
            if not _taken(out):  # another process may have made it while this one waited
                new = not partial.exists()
                partial.mkdir(exist_ok=True)
                try:
                    with naming_file(partial):
                        build(partial)
                except ValueError:
                    if new:  # of input that has to change: there is nothing to go on from
                        shutil.rmtree(partial, ignore_errors=True)
                    raise
                sync_tree(partial)
                os.replace(partial, out)
                sync(out.parent)
            locked.unlink(missing_ok=True)  # whoever still waits for it will find `out`
        finally:
            os.close(descriptor)
    index = shards.read_folder_index(out)
    compare(out, index["arguments"], recorded)
    return index


def _taken(out: Path) -> bool:
    return out.is_dir() and any(out.iterdir())


def _build(
    partial: Path,
    arguments: Arguments,
    recorded: dict[str, Any],
    inputs: Inputs,
    progress: ProgressCallback | None,
) -> None:
    state = _saved_state(partial, recorded, inputs)
    if state is None:
        encoder = _make_tokenizer(partial, arguments, inputs)
        state = dict.fromkeys(("file", "record", "documents", "empty"), 0)
        state |= {"manifest_hash": "", "splits": {}, "arguments": recorded}
        state |= {"inputs": inputs.fingerprint, "tokenizer_sha256": encoder.sha256}
    else:
        encoder = load_encoder(partial / TOKENIZER, eos=arguments.eos)
    if arguments.fim_rate > 0 and encoder.fim_ids is None:
        raise ValueError(
            f"fim_rate {arguments.fim_rate}: {arguments.tokenizer} "
            "has no fill-in-the-middle tokens such as "
            "<|fim_begin|> <|fim_hole|> <|fim_end|>; use a tokenizer that has them, or --fim-rate 0"
        )
    shape: Any = {"dtype": token_dtype(encoder.vocab_size), "masked": arguments.mask is not None}
    shape["shard_tokens"] = arguments.shard_tokens
    writers = {
        split: SplitWriter(partial, split, state=state["splits"].get(split), **shape)
        for split in inputs.splits
    }
    how: Any = {"fim_rate": arguments.fim_rate, "seed": arguments.seed, "progress": progress}
    Tokenising(partial, inputs, encoder, writers, state, **how).run()
    _finish(partial, arguments, inputs, encoder, writers, state)


def _saved_state(partial: Path, recorded: dict[str, Any], inputs: Inputs) -> dict[str, Any] | None:
    """progress.json of an interrupted run, checked against this one; without it all is deleted.
    Raises ValueError: the folder holds other files, or the state of another preparation.
    """
    if foreign := _foreign(partial):
        raise ValueError(
            f"{partial}: holds {', '.join(foreign[:3])}, which no preparation wrote; move it away, "
            "or choose another --out"
        )
    if not _begun(partial):
        for left in partial.iterdir():
            left.unlink()
        return None
    state: dict[str, Any] = {**_read_position(partial)}
    compare(partial, state["arguments"], recorded)
    if state["inputs"] != inputs.fingerprint:
        text = "the input files changed since it was interrupted; delete it and start again"
        raise ValueError(f"{partial}: {text}")
    tokenizer = partial / TOKENIZER
    if not tokenizer.is_file() or file_sha256(tokenizer) != state["tokenizer_sha256"]:
        remedy = f"delete {partial} and start again"
        raise ValueError(f"{tokenizer}: is missing or was changed; {remedy}")
    return state


def _foreign(partial: Path) -> list[str]:
    """What no preparation wrote there."""
    return sorted(left.name for left in partial.iterdir() if not OWN.fullmatch(left.name))


def _begun(partial: Path) -> bool:
    """Some document is tokenised: there is work to go on with."""
    return (partial / PROGRESS).is_file() and _read_position(partial)["documents"] > 0


def _read_position(partial: Path) -> TokenisingState:
    return read_json(partial / PROGRESS, TokenisingState, f"delete {partial} and start again")


def _make_tokenizer(partial: Path, arguments: Arguments, inputs: Inputs) -> DocumentEncoder:
    if arguments.tokenizer is not None:
        # so that errors name the user's file
        load_encoder(Path(arguments.tokenizer), eos=arguments.eos)
        content = Path(arguments.tokenizer).read_bytes()
    else:
        assert arguments.vocab_size is not None
        texts = _train_texts(inputs)
        if (first := next(texts, None)) is None:
            text = "no text for train in it; give more, or another --val-fraction"
            raise ValueError(f"{', '.join(arguments.inputs)}: {text}")
        content = train_tokenizer(itertools.chain([first], texts), arguments.vocab_size).encode()
    with replacing(partial / TOKENIZER) as temporary:
        temporary.write_bytes(content)
    return load_encoder(partial / TOKENIZER, eos=arguments.eos)


def _train_texts(inputs: Inputs) -> Iterator[str]:
    characters = 0
    for document in inputs.read():
        if document.split == "train":
            if document.text:
                yield document.text
            characters += len(document.text)
            if characters >= TRAIN_CHARACTERS:
                return


def _finish(
    partial: Path,
    arguments: Arguments,
    inputs: Inputs,
    encoder: DocumentEncoder,
    writers: dict[str, SplitWriter],
    state: dict[str, Any],
) -> None:
    """Close the shards, write index.json, and leave nothing else in the folder."""
    for writer in writers.values():
        writer.close_shard()
    splits = {split: writer.summary() for split, writer in writers.items()}
    documents = {split: summary["documents"] for split, summary in splits.items()}
    if documents["train"] == 0 or (documents["val"] == 0 and arguments.val_fraction > 0):
        shutil.rmtree(partial)  # nothing in it fits other text or another fraction
        raise ValueError(
            f"{state['documents']} documents ({state['empty']} empty) gave {documents['train']} "
            f"for train and {documents['val']} for val; give more text, another --val-fraction (0: "
            "no val), or, for few long text files, --val-by-position"
        )
    index = {
        "format": shards.FORMAT,
        "version": shards.VERSION if arguments.mask is None else shards.MASKED_VERSION,
        "vocab_size": encoder.vocab_size,
        "dtype": token_dtype(encoder.vocab_size).name,
        "eos_id": encoder.eos_id,
        "tokenizer_sha256": encoder.sha256,
        "manifest_hash": state["manifest_hash"],
        "source": {"inputs": list(arguments.inputs)},
        "empty_documents": state["empty"],
        "arguments": state["arguments"],
        "splits": splits,
    }
    if isinstance(inputs, Corpus):
        index |= {"manifest_hash": inputs.fingerprint, "source": inputs.origin}
        listing = {"manifest_hash": inputs.fingerprint, **inputs.origin, **inputs.listing()}
        write_json(partial / MANIFEST, listing)
    write_json(partial / INDEX, index)
    sweep(partial)
    for left in [partial / PROGRESS, *partial.glob("*.sizes")]:
        left.unlink(missing_ok=True)
