"""What decides the contents of a prepared folder, and how index.json records it."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dsv3_mtp.data.chat import read_template
from dsv3_mtp.data.documents import Corpus, FileInputs, Inputs, Masking
from dsv3_mtp.data.shards import file_sha256, text_sha256
from dsv3_mtp.data.sitelib import sitelib_inputs
from dsv3_mtp.data.stdlib import stdlib_inputs
from dsv3_mtp.data.tokenizer import END_OF_TEXT, MIN_VOCAB, load_encoder

# Text that every environment brings along, by `data.build`.
CORPORA: dict[str, Callable[[], Corpus]] = {"pystdlib": stdlib_inputs, "sitelib": sitelib_inputs}


@dataclass(frozen=True)
class Arguments:
    """What decides the contents of a prepared folder.

    corpus         "pystdlib" or "sitelib", or None for `inputs`: files, folders and globs
    tokenizer      a tokenizer.json; None: one of `vocab_size` tokens is trained on the train split
    eos            its end-of-text token (None: the first of the common names that it has)
    val_fraction   share of val documents, chosen by content hash (a corpus has a fixed one)
    fim_rate       share of train documents made fill-in-the-middle; val stays plain, so that
                   losses can be compared
    shard_tokens   a shard ends with the document that reaches this
    val_by_position  the end of every text file is val, `val_fraction` of it: for one long file
    skip_unreadable  leave out files that are no UTF-8 text, where else the preparation stops
    mask           "prompts": records are questions and answers (data/chat.py), and only answers are
                   targets; None: text, all of it
    """

    corpus: str | None = None
    inputs: tuple[str, ...] = ()
    text_key: str = "text"
    tokenizer: str | None = None
    vocab_size: int | None = None
    eos: str | None = None
    val_fraction: float = 0.1
    fim_rate: float = 0.0
    shard_tokens: int = 100_000_000
    seed: int = 0
    mask: str | None = None
    val_by_position: bool = False
    skip_unreadable: bool = False

    def __post_init__(self) -> None:
        problems = []
        if (self.corpus is None) == (not self.inputs):
            problems.append("give either a corpus or inputs (--corpus or --input)")
        if self.corpus is not None and self.corpus not in CORPORA:
            problems.append(f"corpus {self.corpus!r}: must be one of {', '.join(CORPORA)}")
        if (self.tokenizer is None) == (self.vocab_size is None):
            text = "a tokenizer.json or a vocab_size to train one (--tokenizer or --vocab-size)"
            problems.append(f"give either {text}")
        elif self.vocab_size is not None and self.eos not in (None, END_OF_TEXT):
            text = f"goes with --tokenizer; one that is trained has {END_OF_TEXT}"
            problems.append(f"--eos {self.eos}: {text}")
        if self.vocab_size is not None and not MIN_VOCAB <= self.vocab_size <= 2**20:
            least = f"{MIN_VOCAB} (256 bytes, {MIN_VOCAB - 256} special tokens)"
            problems.append(f"vocab_size {self.vocab_size}: must be >= {least} and <= {2**20:,}")
        if not 0 <= self.seed < 2**63:
            problems.append(f"seed {self.seed}: must be >= 0 and < 2^63")
        if not 0 <= self.val_fraction < 1:
            problems.append(f"val_fraction {self.val_fraction}: must be in [0, 1)")
        if self.corpus is not None and self.val_fraction != 0.1:
            text = f"the split of {self.corpus} is fixed; leave it at 0.1"
            problems.append(f"val_fraction {self.val_fraction}: {text}")
        if not 0 <= self.fim_rate <= 1:
            problems.append(f"fim_rate {self.fim_rate}: must be in [0, 1]")
        if self.mask not in (None, "prompts"):
            problems.append(f"mask {self.mask!r}: must be prompts")
        if self.mask is not None and (self.corpus is not None or self.fim_rate > 0):
            text = "it goes neither with --corpus nor with --fim-rate"
            problems.append(f"--mask prompts reads questions and answers: {text}")
        if self.corpus is not None and (self.val_by_position or self.skip_unreadable):
            problems.append("--val-by-position and --skip-unreadable go with --input")
        if self.shard_tokens < 1:
            problems.append(f"shard_tokens {self.shard_tokens}: must be at least 1")
        if problems:
            raise ValueError("\n".join(problems))


def open_inputs(arguments: Arguments, out: Path) -> Inputs:
    if arguments.corpus is not None:
        return CORPORA[arguments.corpus]()
    masking, given = None, Path(arguments.tokenizer or "")
    if arguments.mask is not None:
        masking = Masking(None, frozenset())
    if masking is not None and given.is_file():
        masking = Masking(read_template(given), load_encoder(given, eos=arguments.eos).specials)
    return FileInputs(
        list(arguments.inputs),
        text_key=arguments.text_key,
        val_fraction=arguments.val_fraction,
        out=out,
        masking=masking,
        val_by_position=arguments.val_by_position,
        skip_unreadable=arguments.skip_unreadable,
    )


def record(arguments: Arguments, inputs: Inputs) -> dict[str, Any]:
    """The arguments as index.json keeps them: a tokenizer by hash, the inputs by name and size."""
    recorded = asdict(arguments) | {"inputs": list(arguments.inputs)}
    for key in ("mask", "val_by_position", "skip_unreadable"):
        if not recorded[key]:  # folders of older versions have no such key
            del recorded[key]
    if arguments.tokenizer is not None and Path(arguments.tokenizer).is_file():
        recorded["tokenizer"] = file_sha256(Path(arguments.tokenizer))
    if isinstance(inputs, FileInputs):
        if inputs.masking is not None and inputs.masking.template is not None:
            recorded["chat_template"] = text_sha256(inputs.masking.template.source)
        sizes = zip(inputs.files, inputs.sizes, strict=True)
        recorded["files"] = [[str(path), size] for path, size in sizes]
    else:
        recorded["files"] = inputs.fingerprint
    return recorded


def compare(folder: Path, there: dict[str, Any], now: dict[str, Any]) -> None:
    differences = []
    for key, value in now.items():
        if (old := there.get(key)) != value:
            long = key == "files" or (key == "tokenizer" and None not in (old, value))
            what = "other contents" if long else f"{old} there, {value} now"
            differences.append(f"{key}: {what}")
    if differences:
        text = f"{folder} was made with other arguments; repeat those, choose another --out, or"
        raise ValueError("\n  ".join([f"{text} delete it:", *differences]))
