"""Train a byte-level BPE or load any Hugging Face tokenizer.json; documents to token ids."""

import hashlib
import itertools
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from dsv3_mtp.data.chat import Piece, join
from dsv3_mtp.files.checked import read_json

END_OF_TEXT = "<|endoftext|>"
# (begin, hole, end) = (before the prefix, before the suffix, before the middle); the second to
# fourth are those of DeepSeek, Qwen and StarCoder.
FIM_NAMES = (
    ("<|fim_begin|>", "<|fim_hole|>", "<|fim_end|>"),
    ("<\uff5cfim\u2581begin\uff5c>", "<\uff5cfim\u2581hole\uff5c>", "<\uff5cfim\u2581end\uff5c>"),
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
)
EOS_NAMES = (
    *(END_OF_TEXT, "<\uff5cend\u2581of\u2581sentence\uff5c>", "<|end_of_text|>"),
    *("<|eos_token|>", "<|eos|>", "<eos>", "</s>", "[EOS]"),
)
SPECIAL_TOKENS = (END_OF_TEXT, *FIM_NAMES[0])
MIN_VOCAB = 256 + len(SPECIAL_TOKENS)
# The trainer's time is quadratic in the length of a word: a megabyte of base64 would take an hour.
ENDLESS_WORD = re.compile(r"(\S{1000}|\s{1000})")


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> str:
    """A byte-level BPE with exactly `vocab_size` tokens as the text of a tokenizer.json.

    `<|endoftext|>` has id 0, the three fill-in-the-middle tokens follow. Words are learned from in
    pieces of at most 1000 characters. Deterministic.

    Raises ValueError when `vocab_size` is below 260 or above what the texts can fill.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if vocab_size < MIN_VOCAB:
        least = f"{MIN_VOCAB} (256 bytes, {len(SPECIAL_TOKENS)} special tokens)"
        raise ValueError(f"vocab_size {vocab_size}: at least {least}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((ENDLESS_WORD.split(text) for text in texts), trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise ValueError(
            f"vocab_size {vocab_size}: the training documents have pairs for only "
            f"{tokenizer.get_vocab_size()} tokens; ask for at most that, or give more text"
        )
    return tokenizer.to_str(pretty=True)


@dataclass(frozen=True)
class DocumentEncoder:
    """Documents to token ids. Text that looks like a special token is plain characters."""

    tokenizer: Any  # tokenizers.Tokenizer
    vocab_size: int  # largest id + 1
    eos_id: int
    fim_ids: tuple[int, int, int] | None  # begin, hole, end
    sha256: str  # of the tokenizer.json

    @cached_property
    def specials(self) -> frozenset[str]:
        """The tokenizer's special tokens, as text."""
        added = self.tokenizer.get_added_tokens_decoder().values()
        return frozenset(token.content for token in added if token.special)

    @cached_property
    def _with_specials(self) -> Any:
        """The same tokenizer, for text in which special tokens are special."""
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_str(self.tokenizer.to_str())
        tokenizer.encode_special_tokens = False
        return tokenizer

    def encode_prompt(self, pieces: tuple[Piece, ...]) -> list[int]:
        """Token ids of the text in front of an answer: `encode_pieces` without end of text."""
        return [token for piece in pieces for token in self._ids(piece)]

    def encode_pieces(self, pieces: tuple[Piece, ...]) -> tuple[np.ndarray, np.ndarray]:
        """Token ids (n,) int64 of a document in pieces, and which of them are targets (n,) bool.

        The end of text comes last, unless the pieces end with it; it is a target as the piece in
        front of it is.
        """
        parts = [(self._ids(piece), piece.scored) for piece in pieces]
        ids, scored = join(parts)
        if not len(ids) or ids[-1] != self.eos_id:
            ids, scored = join([*parts, ([self.eos_id], pieces[-1].scored)])
        return ids, scored

    def _ids(self, piece: Piece) -> list[int]:
        tokenizer = self._with_specials if piece.special else self.tokenizer
        return tokenizer.encode(piece.text, add_special_tokens=False).ids

    def encode(self, documents: list[tuple[str, ...]]) -> list[np.ndarray]:
        """Token ids (n,) per document, EOS last; a document is (text,) or (prefix, middle, suffix).

        FIM order is PSM: begin prefix hole suffix end middle EOS (arXiv 2412.19437, section 4.1).
        """
        pieces = [piece for document in documents for piece in document]
        encodings = iter(self.tokenizer.encode_batch_fast(pieces, add_special_tokens=False))
        out = []
        for document in documents:
            ids = [next(encodings).ids for _ in document]
            if len(ids) == 3 and self.fim_ids is not None:
                begin, hole, end = self.fim_ids
                prefix, middle, suffix = ids
                ids = [[begin], prefix, [hole], suffix, [end], middle]
            out.append(np.array([*itertools.chain.from_iterable(ids), self.eos_id], np.int64))
        return out


def recorded_eos(path: Path) -> int | None:
    """The end-of-text id that the data or checkpoint around a tokenizer.json was made with."""
    for name, key in (("index.json", "eos_id"), ("config.json", "eos_token_id")):
        if (beside := path.with_name(name)).is_file():
            remedy = f"it belongs to {path.name}, make both again"
            recorded = read_json(beside, dict[str, Any], remedy).get(key)
            # a checkpoint may name none, or several
            return recorded if isinstance(recorded, int) else None
    return None


def load_encoder(path: Path, *, eos: str | int | None = None) -> DocumentEncoder:
    """Reads a tokenizer.json. eos: its end of text, by name or id; None: the first common name.
    Raises ValueError: the file is no tokenizer or has no such token.
    """
    from tokenizers import Tokenizer

    if not path.is_file():
        needed = "a tokenizer.json of Hugging Face tokenizers is needed"
        raise ValueError(f"{path}: no such file; {needed}")
    content = path.read_bytes()
    try:
        tokenizer = Tokenizer.from_buffer(content)
    except Exception as error:  # the Rust side raises plain Exception
        raise ValueError(f"{path}: not a Hugging Face tokenizer.json ({error})") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    vocab = tokenizer.get_vocab(with_added_tokens=True)
    name = tokenizer.id_to_token(eos) if isinstance(eos, int) else eos
    if eos is None:
        name = next((name for name in EOS_NAMES if name in vocab), None)
    if name is None and eos is not None:
        raise ValueError(
            f"{path}: has no token {eos}, which the index.json or config.json beside it gives as "
            "the end of text; one of the two is damaged, or of another tokenizer"
        )
    if name is None or name not in vocab:
        looked = " ".join(ascii(n)[1:-1] for n in EOS_NAMES) if eos is None else repr(eos)
        text = f"has no end-of-text token {looked}; name the one it has with --eos"
        raise ValueError(f"{path}: {text}")
    fim = next((names for names in FIM_NAMES if all(name in vocab for name in names)), None)
    fim_ids = None if fim is None else (vocab[fim[0]], vocab[fim[1]], vocab[fim[2]])
    digest = hashlib.sha256(content).hexdigest()
    return DocumentEncoder(tokenizer, max(vocab.values()) + 1, vocab[name], fim_ids, digest)


def recorded_encoder(path: Path, vocab_size: int) -> DocumentEncoder:
    """`load_encoder` with the end of text that the data or weights beside it were made with.

    Raises:
        ValueError: as `load_encoder`; or it has ids that a model of `vocab_size` has not.
    """
    encoder = load_encoder(path, eos=recorded_eos(path))
    if encoder.vocab_size > vocab_size:
        raise ValueError(
            f"{path}: has token ids up to {encoder.vocab_size - 1}, but the model's vocab_size is "
            f"{vocab_size}: it belongs to another model; put back the model's own"
        )
    return encoder


def fim_split(text: str, *, rate: float, seed: int, document: int) -> tuple[str, ...]:
    """(prefix, middle, suffix) with probability `rate`, else (text,): a pure function."""
    digest = hashlib.sha256(f"fim {seed} {document}".encode()).digest()
    draws = [int.from_bytes(digest[i : i + 8], "little") for i in (0, 8, 16)]
    if draws[0] / 2**64 >= rate:
        return (text,)
    first, second = sorted(draw % (len(text) + 1) for draw in draws[1:])
    return text[:first], text[first:second], text[second:]
