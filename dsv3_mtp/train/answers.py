"""Text that a trunk writes itself, as training data for its heads (`prepare --from-run`).

Heads draft what the main model samples, so they are trained on its own answers to prompts, as
FastMTP's (arXiv 2509.18362): prompts are unscored, answers are drawn at temperature 1, at which
overlap is defined. The folder is a prepared one like any other, with `.scored` files.

Batch b of the prompts is drawn with a seed of its own, made of `seed` and b. So the answers do not
depend on how often the work was interrupted: after every batch DIR.partial/progress.json says how
far the shards on disk go.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field, with_config
from typing_extensions import TypedDict

from dsv3_mtp.data.chat import Piece, prompt_pieces, read_template
from dsv3_mtp.data.documents import VAL_BUCKETS
from dsv3_mtp.data.megatron import token_dtype
from dsv3_mtp.data.prepare import TOKENIZER, make_folder
from dsv3_mtp.data.records import JSONL, jsonl_records
from dsv3_mtp.data.shards import (
    FORMAT,
    INDEX,
    MASKED_VERSION,
    FolderIndex,
    SplitState,
    SplitWriter,
    file_sha256,
)
from dsv3_mtp.data.tokenise import PROGRESS
from dsv3_mtp.data.tokenizer import DocumentEncoder, recorded_encoder
from dsv3_mtp.decode.generate import Settings, generate, prompt_problems
from dsv3_mtp.files.atomic import replacing, sweep, write_json
from dsv3_mtp.files.checked import OPEN, read_json
from dsv3_mtp.runs.model import LoadedModel, load_model

Report = Callable[[int, int, int], None]  # prompts done, prompts in all, tokens written


@with_config(OPEN)
class AnsweringState(TypedDict):
    """progress.json."""

    arguments: dict[str, Any]
    batches: Annotated[int, Field(ge=0)]
    splits: dict[str, SplitState]


@dataclass(frozen=True)
class AnswerArguments:
    """What decides the contents of a folder of answers.

    run              a run folder, whose newest weights answer
    prompts          .jsonl with {prompt} or {messages}; of any other file each line is a prompt
    max_new_tokens   an answer that has not ended by then is cut off there
    batch            prompts that are answered together: memory, and part of what is drawn
    """

    run: str
    prompts: str
    max_new_tokens: int = 512
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    batch: int = 32
    val_fraction: float = 0.1
    shard_tokens: int = 100_000_000

    def __post_init__(self) -> None:
        problems = list(self.settings(0).problems())
        if self.batch < 1 or self.shard_tokens < 1:
            problems.append("batch and shard_tokens must be at least 1")
        if not 0 <= self.val_fraction < 1:
            problems.append(f"val_fraction {self.val_fraction}: must be in [0, 1)")
        if problems:
            raise ValueError("\n".join(problems))

    def settings(self, batch: int, *, eos: int | None = None) -> Settings:
        """How batch number `batch` is answered."""
        digest = hashlib.sha256(f"answers {self.seed} {batch}".encode()).digest()
        return Settings(
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            seed=int.from_bytes(digest[:7], "little"),
            stop_tokens=() if eos is None else (eos,),
        )


def write_answers(
    out: str | Path, arguments: AnswerArguments, *, progress: Report | None = None
) -> FolderIndex:
    """Makes the prepared folder `out`, or goes on where an interrupted call with the same arguments
    stopped. Returns the contents of its index.json.

    Raises:
        ValueError: no run, no tokenizer or no prompts there, a prompt that the model cannot read,
            or `out` was made with other arguments.
    """
    prompts_file = Path(arguments.prompts)
    lines = list(_read_prompts(prompts_file))
    run = load_model(arguments.run)
    if run.tokenizer is None:
        raise ValueError(f"{arguments.run}: has no tokenizer.json, and prompts are text")
    encoder = recorded_encoder(run.tokenizer, run.model.config.vocab_size)
    template = read_template(run.tokenizer)
    prompts = [
        encoder.encode_prompt(_pieces(content, template, encoder, place))
        for place, content in lines
    ]
    if problems := list(prompt_problems(run.model, prompts)):
        raise ValueError(f"{prompts_file}: {'; '.join(problems[:3])}")
    recorded = asdict(arguments) | {
        "prompts": file_sha256(prompts_file),
        "weights": _weights_hash(run),
        "tokenizer": encoder.sha256,
        "mask": "prompts",
    }

    def build(partial: Path) -> None:
        _Answering(partial, arguments, recorded, run, encoder, prompts, progress).work()

    return make_folder(Path(out), recorded, build)


class _Answering:
    """One stretch of work on DIR.partial."""

    def __init__(
        self,
        partial: Path,
        arguments: AnswerArguments,
        recorded: dict[str, Any],
        run: LoadedModel,
        encoder: DocumentEncoder,
        prompts: list[list[int]],
        progress: Report | None,
    ) -> None:
        self.partial, self.arguments, self.recorded = partial, arguments, recorded
        self.run, self.encoder, self.prompts, self.progress = run, encoder, prompts, progress
        state = _saved(partial, recorded)
        self.done = 0 if state is None else state["batches"]
        size = run.config.model.vocab_size
        self.writers = {
            split: SplitWriter(
                partial,
                split,
                dtype=token_dtype(size),
                shard_tokens=arguments.shard_tokens,
                masked=True,
                state=None if state is None else dict(state["splits"][split]),
            )
            for split in ("train", "val")
        }

    def work(self) -> None:
        size = self.arguments.batch
        for number in range(self.done, -(-len(self.prompts) // size)):
            prompts = self.prompts[number * size : (number + 1) * size]
            settings = self.arguments.settings(number, eos=self.encoder.eos_id)
            answers = generate(self.run.model, prompts, settings).tokens
            for prompt, answer in zip(prompts, answers, strict=True):
                self._append(prompt, answer)
            self._save(number + 1)
            if self.progress is not None:
                written = sum(writer.total_tokens for writer in self.writers.values())
                self.progress(number * size + len(prompts), len(self.prompts), written)
        self._finish()

    def _append(self, prompt: list[int], answer: list[int]) -> None:
        digest = hashlib.sha256(json.dumps(prompt).encode()).digest()
        share = int.from_bytes(digest, "big") % VAL_BUCKETS
        split = "val" if share < self.arguments.val_fraction * VAL_BUCKETS else "train"
        scored = np.arange(len(prompt) + len(answer)) >= len(prompt)
        text = self.encoder.tokenizer.decode(answer, skip_special_tokens=True)
        self.writers[split].append(np.array(prompt + answer), len(text.encode()), scored)

    def _save(self, batches: int) -> None:
        for writer in self.writers.values():
            writer.flush()
        splits = {split: writer.state() for split, writer in self.writers.items()}
        state = {"arguments": self.recorded, "batches": batches, "splits": splits}
        write_json(self.partial / PROGRESS, state)

    def _finish(self) -> None:
        for writer in self.writers.values():
            writer.close_shard()
        splits = {split: writer.summary() for split, writer in self.writers.items()}
        if not splits["train"]["bytes"] or (
            splits["val"]["documents"] and not splits["val"]["bytes"]
        ):
            raise ValueError(
                f"{len(self.prompts)} prompts gave {splits['train']['documents']} answers for "
                f"train and {splits['val']['documents']} for val, and no text in one of them; give "
                "more prompts"
            )
        assert self.run.tokenizer is not None
        with replacing(self.partial / TOKENIZER) as temporary:
            temporary.write_bytes(self.run.tokenizer.read_bytes())
        digests = [shard["sha256"] for split in splits.values() for shard in split["shards"]]
        index = {
            "format": FORMAT,
            "version": MASKED_VERSION,
            "vocab_size": self.encoder.vocab_size,
            "dtype": token_dtype(self.run.config.model.vocab_size).name,
            "eos_id": self.encoder.eos_id,
            "tokenizer_sha256": self.encoder.sha256,
            "manifest_hash": hashlib.sha256(json.dumps(digests).encode()).hexdigest(),
            "source": {"answers of": self.arguments.run, "to": self.arguments.prompts},
            "arguments": self.recorded,
            "splits": splits,
        }
        write_json(self.partial / INDEX, index)
        sweep(self.partial)
        for left in [self.partial / PROGRESS, *self.partial.glob("*.sizes")]:
            left.unlink(missing_ok=True)


def _saved(partial: Path, recorded: dict[str, Any]) -> AnsweringState | None:
    path = partial / PROGRESS
    if not path.is_file():
        return None
    state = read_json(path, AnsweringState, f"delete {partial} and start again")
    if other := [key for key in recorded if state["arguments"].get(key) != recorded[key]]:
        raise ValueError(
            f"{partial} was begun with another {', '.join(other)}; repeat it, choose another "
            "--out, or delete it"
        )
    return state


def _read_prompts(path: Path) -> Iterator[tuple[str, Any]]:
    """(where it stands, record or text) of every prompt.

    Raises:
        ValueError: there is no such file, it is no UTF-8 text, or it holds no prompt.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file; --prompts needs .jsonl, or a prompt per line")
    found = 0
    if path.name.endswith(JSONL):
        for _, _, record, place in jsonl_records(path, None, 0):
            found += 1
            yield place, record
    else:
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not UTF-8 text ({error.reason})") from None
        for number, line in enumerate(lines, 1):
            if line.strip():
                found += 1
                yield f"{path}, line {number}", {"prompt": line}
    if not found:
        raise ValueError(f"{path}: holds no prompt")


def _pieces(content: Any, template: Any, encoder: DocumentEncoder, place: str) -> tuple[Piece, ...]:
    return prompt_pieces(content, template, specials=encoder.specials, place=place)


def _weights_hash(run: LoadedModel) -> str:
    """Of the weights that answer: the run's may have been trained on since."""
    digest = hashlib.sha256()
    for name, tensor in run.model.state_dict().items():
        if not name.startswith("mtp."):  # heads draft, and the main model decides
            sums = tensor.double().sum(), tensor.double().abs().sum()
            digest.update(f"{name} {[float(x) for x in sums]}".encode())
    return digest.hexdigest()
