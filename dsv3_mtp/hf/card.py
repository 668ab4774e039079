"""README.md of an export, the model card: what it is, what it scored beside its floors, how each
reader loads it. It is the user's to edit: nothing reads it again.
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dsv3_mtp.config import Config
from dsv3_mtp.data.ngrams import early_training
from dsv3_mtp.files.run_folder import COMPLETE, read_reached
from dsv3_mtp.hf.keys import Slot
from dsv3_mtp.hf.readers import READERS, Finding, commands, findings
from dsv3_mtp.model.causal_lm import meta_model
from dsv3_mtp.model.size import model_size
from dsv3_mtp.report.metrics import depths_of, read_metrics
from dsv3_mtp.report.progress import quantity

CARD, BESIDE = "README.md", "README_MTP.md"
FLOORS = ("unigram", "bigram", "trigram")
FRONT = """---
library_name: transformers
{tags}
# license: yours to choose, and to write here
---"""


class Made(NamedTuple):
    """How the files of an export came about. origin: the checkpoint or the imported weights."""

    run: Path
    config: Config
    origin: Path
    modules: int
    dtype: str
    ema: bool


def write_card(folder: Path, made: Made, expected: Iterable[Slot]) -> list[str]:
    """Writes the card of `folder`. A folder that has a README.md keeps it, and gets the card under
    another name. Returns notes.
    """
    kept = (folder / CARD).exists()
    found = findings(made.config.model, expected, made.modules, made.dtype)
    record, why = _record(made)
    is_text = (folder / "tokenizer.json").is_file()
    tags = ", multi-token-prediction, speculative-decoding" if made.modules else ""
    front = ["pipeline_tag: text-generation"] * is_text + [f"tags: [deepseek_v3{tags}]"]
    lines = [
        FRONT.format(tags="\n".join(front)),
        f"# {made.config.run.name}",
        _what(made),
        *_table(["", ""], _facts(made)),
        "## Numbers",
        *_numbers(made, record, why),
        "## Use",
        "`MODEL` is this folder, or its name on a hub. Read from the code of the versions named; "
        "transformers was also run.",
        *([] if is_text else ["There is no tokenizer here: token ids go in and come out."]),
        *(line for reader in READERS for line in _use(reader, made.modules, found)),
        "`dsv3 generate --hf MODEL` and `dsv3 import --from MODEL` are those of the project that "
        "made it, dsv3_mtp.",
        "## License",
        "None is stated here. Whoever publishes this model chooses one, and writes it at the top.",
    ]
    name = BESIDE if kept else CARD
    (folder / name).write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    return [f"{CARD} is the trunk's own and was kept; the card is {BESIDE}"] if kept else []


def _what(made: Made) -> str:
    mtp, modules = made.config.mtp, made.modules
    if modules:
        how = f"{modules} multi-token prediction (MTP) module{'s' * (modules > 1)}"
        ending = f"with {how}, which draft{'s' * (modules == 1)} tokens for speculative decoding"
    elif mtp.depths:
        ending = f"without the {mtp.depths} {mtp.mode} heads it was trained with"
    else:
        ending = "without MTP modules"
    return (
        "A language model of DeepSeek-V3's architecture "
        f"([arXiv 2412.19437](https://arxiv.org/abs/2412.19437)), {ending}."
    )


def _facts(made: Made) -> Iterator[tuple[str, str]]:
    config, model = made.config, made.config.model
    size = model_size(meta_model(model, config.mtp), config.data.seq_len)
    yield (
        "architecture",
        f"`DeepseekV3ForCausalLM`: {model.num_hidden_layers} layers of width {model.hidden_size}, "
        f"{model.num_attention_heads} heads of latent attention, {model.n_routed_experts} routed "
        f"experts ({model.num_experts_per_tok} per token) and {model.n_shared_experts} shared",
    )
    yield "parameters", f"{quantity(size.total)}, {quantity(size.active)} per token"
    if made.modules:
        heads = f"D = {made.modules}, {config.mtp.mode}, {quantity(size.mtp_total)} parameters"
        yield "MTP", f"{heads}; trained on {_objective(config.mtp.objective)}"
    yield "vocabulary, context", f"{model.vocab_size:,}, {model.max_position_embeddings:,}"
    average = ", a moving average over training (EMA)" if made.ema else ""
    yield "weights", f"{made.dtype}{average}"
    yield "trained on", _training(made)


def _objective(weights: Mapping[str, float]) -> str:
    if len(weights) == 1:
        return f"`{next(iter(weights))}`"
    return " + ".join(f"{weight:g} `{name}`" for name, weight in weights.items())


def _training(made: Made) -> str:
    """Names of folders only: a path says where its user works."""
    config = made.config
    start = config.train.init_from
    if (made.origin / COMPLETE).is_file():
        reached = read_reached(made.origin)
        if config.data.task is not None:
            source = f"the generated task {config.data.task.type}"
        else:
            source = ", ".join(_name(entry.path) for entry in config.data.entries)
        text = f"{quantity(reached['tokens'])} tokens ({reached['step']:,} steps) of {source}"
        if config.train.freeze == "trunk":
            return f"the MTP modules: {text}; the trunk was not changed"
        return f"{text}, after the weights it began from" if start else text
    return "not by this project: the weights were imported"


def _name(path: Any) -> str:
    return Path(path).name if isinstance(path, str) else path.type


def _record(made: Made) -> tuple[dict[str, Any], str]:
    """The validation of the exported weights; or an empty one, and why there is none."""
    path = made.run / "metrics.jsonl"
    if made.ema:
        return {}, "Training validates the weights, not their moving average, which this is."
    if not (made.origin / COMPLETE).is_file() or not path.is_file():
        return {}, "No training run of these weights is recorded."
    step = read_reached(made.origin)["step"]
    for record in reversed(read_metrics(path)):
        if record["step"] == step and "val/main_loss" in record:
            return record, ""
    return {}, f"The weights of step {step:,} were not validated."


def _numbers(made: Made, record: Mapping[str, Any], why: str) -> Iterator[str]:
    if not record:
        yield why
        return
    tables = [f"{n} {record[k]:.3f}" for n in FLOORS if (k := f"val/floor/{n}") in record]
    rows = [("main loss, nats per token", f"{record['val/main_loss']:.3f}", ", ".join(tables))]
    if "val/bits_per_byte" in record:
        rows.append(("bits per byte", f"{record['val/bits_per_byte']:.3f}", ""))
    depths = depths_of(record, "val/overlap") if made.modules else []
    for depth in depths:
        table = record.get(f"val/floor/overlap/table/{depth}")
        beside = "" if table is None else f"table drafter {table:.3f}"
        rows.append((f"overlap of depth {depth}", f"{record[f'val/overlap/{depth}']:.3f}", beside))
    yield f"On the run's validation text, computed in {made.config.train.dtype}:"
    yield from _table(["", "this model", "without a network"], rows)
    if any(tables):
        yield "Without a network: n-gram tables of the tokens that the model was trained on."
    if depths:
        yield (
            "Overlap: the probability along real text that a sampled draft is accepted. `dsv3 "
            "evaluate` measures that of a table drafter, which belongs beside it."
        )
    if early := early_training(record):
        yield f"**{early}**"


def _table(head: list[str], rows: Iterable[tuple[str, ...]]) -> Iterator[str]:
    lines = [head, ["---"] * len(head), *rows]
    yield "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _use(reader: str, modules: int, found: list[Finding]) -> Iterator[str]:
    mine = [one for one in found if one.reader == reader]
    fatal = any(one.fatal for one in mine)
    yield f"### {READERS[reader]}"
    if mine:
        yield "\n".join(f"- {one.text}" for one in mine)
    if not fatal:
        language, text = commands(reader, modules, mine)
        yield f"```{language}\n{text}\n```"
