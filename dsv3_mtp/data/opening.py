"""The data of a run, opened as its config says, to train on and to validate on."""

from pathlib import Path
from typing import Any

from dsv3_mtp.config import Config
from dsv3_mtp.config.source import SourceSection
from dsv3_mtp.data.own import OwnSource
from dsv3_mtp.data.prepare import Arguments, prepare
from dsv3_mtp.data.sampler import Sampler, is_masked
from dsv3_mtp.data.source import (
    DataSource,
    check_documents,
    check_tokenizers,
    check_vocab,
    open_source,
    tokenizer_sha256,
)
from dsv3_mtp.tasks.base import TaskSource


def build_missing(config: Config) -> None:
    """Prepares the corpus that `data.build` names, if it is not there. Raises ValueError: the
    folder is not named after the corpus: a user's own text was meant.
    """
    folder, corpus = config.data.train, config.data.build
    if corpus is None or not isinstance(folder, str) or Path(folder).exists():
        return
    if Path(f"{folder}.idx").exists():  # a Megatron pair
        return
    if corpus not in Path(folder).name and not Path(f"{folder}.partial").exists():
        raise ValueError(
            f"data.train: {folder} is not there; prepare your text with: dsv3 prepare --input FILES"
            f" --out {folder} --vocab-size {config.model.vocab_size} (data.build: {corpus} makes "
            f"only a folder with {corpus} in its name)"
        )
    text = f"missing, building {corpus} from the Python files of this environment"
    print(f"{folder}: {text}", flush=True)
    prepare(folder, Arguments(corpus=corpus, vocab_size=config.model.vocab_size))


def open_sources(config: Config) -> tuple[Sampler, DataSource]:
    """The training sampler and the validation source. Raises ValueError: they cannot be used."""
    windows: Any = {"seq_len": config.data.seq_len, "lookahead": config.mtp.lookahead}
    windows["seed"] = config.run.seed
    sources = [_open(config, entry.path, "train") for entry in config.data.entries]
    val = validation_source(config)
    if val.task is not None:
        return Sampler([val], **windows), val
    check_masks(config.data.mask, sources, val)
    for source in sources:
        check_vocab(source, config.model.vocab_size)
    for source in [*sources, val] if config.data.mask_documents else []:
        check_documents(source, config.mtp.depths, config.mtp.lookahead)
    made = [(source.path, source.tokenizer_sha256) for source in [*sources, val]]
    if (weights_of := config.train.init_from) is not None:
        made.append((weights_of, tokenizer_sha256(Path(weights_of, "tokenizer.json"))))
    check_tokenizers(made)
    return Sampler(sources, [entry.weight for entry in config.data.entries], **windows), val


def check_masks(mask: str, sources: list[DataSource], val: DataSource) -> None:
    """Raises ValueError: `data.mask` says another thing than the data. No loss would show it."""
    masked = [source.path for source in sources if is_masked(source)]
    if mask == "prompts" and not masked:
        raise ValueError(
            f"data.mask: prompts, but {', '.join(s.path for s in sources)} was not prepared with "
            "--mask prompts; prepare it so, or set data.mask: none"
        )
    if mask == "none" and (found := masked or [val.path] * is_masked(val)):
        raise ValueError(
            f"{found[0]} was prepared with --mask prompts; set data.mask: prompts, or prepare it "
            "without"
        )


def validation_source(config: Config, split: str = "val") -> DataSource:
    """What a run is validated on: data.val, or other examples of its task than it is trained on.
    Raises ValueError: the data cannot be used, or another split is asked of a task.
    """
    if config.data.task is None:
        source = _open(config, config.data.val or "", split)
        check_vocab(source, config.model.vocab_size)
        return source
    if split != "val":
        text = f"has no split {split!r}: its training examples are all new"
        raise ValueError(f"data.task {config.data.task.type} {text}")
    return TaskSource(config.data.task)


def _open(config: Config, data: str | SourceSection, split: str) -> DataSource:
    if not isinstance(data, str):
        return OwnSource(data, split, config.model.vocab_size)
    tokenizer = Path(config.train.init_from or "", "tokenizer.json")
    options = f" --vocab-size {config.model.vocab_size}"
    if config.train.init_from is not None and tokenizer.is_file():
        options = f" --tokenizer {tokenizer}"  # weights know the ids of their own one only
    return open_source(data, split, options)
