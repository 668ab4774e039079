"""The floors of a run of text: n-gram tables counted from the tokens it was trained
on, and drafters without a network that are measured with its own main model.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsv3_mtp.config import Config
from dsv3_mtp.data.ngrams import MOST_TOKENS, NGrams, floor_metrics
from dsv3_mtp.data.opening import open_sources
from dsv3_mtp.data.sampler import Sampler, sequential_windows, spare_windows
from dsv3_mtp.data.source import DataSource, Source
from dsv3_mtp.decode.decoder import Decoder
from dsv3_mtp.decode.forced import forced_overlap
from dsv3_mtp.decode.generation import Settings
from dsv3_mtp.files.run_folder import newest_checkpoint, read_reached, run_config
from dsv3_mtp.model.causal_lm import DeepseekV3MTP
from dsv3_mtp.model.overlap import overlap_means, sums_of_slots
from dsv3_mtp.model.targets import teacher_slots, valid_targets
from dsv3_mtp.train.checkpoint import read_state
from dsv3_mtp.train.drafts import DraftStatistics, TableDrafters
from dsv3_mtp.train.validation import to_device

PLACES = 4  # of every window, for drafts beyond D: each takes a prefill
FIT_SLOTS = 2**16  # of the table drafters: other windows of the validation text


def trained_on(run: str | Path, *, trust_code: bool = False) -> Sampler | None:
    """The sampler of a run of text at its newest checkpoint; None: it has not trained on text.

    Raises:
        ValueError: the data it was trained on is not there, or is another text by now.
    """
    config = run_config(Path(run), trust_code=trust_code)
    newest = newest_checkpoint(Path(run) / "checkpoints")
    if config.data.task is not None or newest is None:
        return None
    if "sampler" not in read_reached(newest):  # weights without a training run
        return None
    state = read_state(newest)
    sampler, _ = open_sources(config)
    sampler.load_state_dict(state["sampler"])
    return sampler


def readable_training(
    run: str | Path, *, trust_code: bool = False
) -> tuple[Sampler | None, list[str]]:
    """`trained_on`, or None and why: a model can be evaluated without the text it has read."""
    try:
        return trained_on(run, trust_code=trust_code), []
    except (ValueError, OSError) as error:
        return None, [f"no n-gram floors: the text it was trained on cannot be read ({error})"]


def text_floors(
    sampler: Sampler, val: DataSource, config: Config, *, batches: int
) -> tuple[dict[str, float], str | None]:
    """`val/floor/unigram`, `.../bigram`, `.../trigram` on the validation windows of `val`, in nats
    per token, and in bits per byte where its bytes are known; or none, and why there is none (None:
    some of the data is no text).
    """
    source = val.text
    if source is None:
        return {}, None
    tables, why = text_tables(sampler, config)
    if tables is None:
        return {}, why
    count = batches * config.train.micro_batch_size
    [(rows, documents)] = sequential_windows(
        source, seq_len=config.data.seq_len, lookahead=1, count=count
    )
    losses = tables.losses(rows, documents if config.data.mask_documents else None)
    per_byte = None if source.bytes is None else source.tokens / source.bytes / math.log(2)
    return floor_metrics(losses, per_byte), None


def text_tables(sampler: Sampler, config: Config) -> tuple[NGrams | None, str | None]:
    """The n-gram tables of what a run has consumed; or none, and why (None: it is no text)."""
    if not all(one.text for one in sampler.sources):
        return None, None
    tokens = sampler.samples * sampler.seq_len
    if tokens > MOST_TOKENS:
        why = f"{tokens:,} tokens were consumed, and at most {MOST_TOKENS:,} are counted"
        return None, f"no n-gram floors: {why}"
    if sampler.masked:
        return None, "no n-gram floors: they are of whole texts, and data.mask leaves prompts out"
    if config.train.init_from is not None:
        why = "the weights it began from (train.init_from) had read other text"
        return None, f"no n-gram floors: {why}"
    if sampler.samples < 2:
        return None, "no n-gram floors: fewer than two rows of training text were consumed"
    rows, documents = sampler.consumed()
    seen = documents if config.data.mask_documents else None
    return NGrams(rows, seen, vocab_size=config.model.vocab_size), None


@torch.no_grad()
def drafter_floors(
    model: DeepseekV3MTP, source: Source, config: Config, *, batches: int, device: torch.device
) -> tuple[dict[str, float], list[str]]:
    """`val/floor/overlap/constant/k`, `.../table/k`, and `.../tokens_per_step` of both: what
    `TableDrafters`, fitted on other windows of the validation text, have of this main model.

    And a line for each of the two that could not be had.
    """
    micro = config.train.micro_batch_size
    if not model.depths:
        return {}, []
    count = batches * micro
    tables, why = fitted_tables(model, source, config, count=count, device=device)
    if tables is None:
        return {}, [why]
    windows = {"seq_len": config.data.seq_len, "lookahead": model.lookahead, "count": count}
    sums: dict[str, Tensor] = {}
    for window in sequential_windows(source, **windows, micro_batch_size=micro):
        tokens, documents, scored = to_device(*window, config=config, device=device)
        taught = taught_slots(model, tokens, documents, scored)
        hidden = main_states(model, tokens, documents)
        for name, part in tables.overlaps(
            model.lm_head.head_logits, hidden, tokens, taught
        ).items():
            total = sums_of_slots(part, taught)
            sums[name] = sums[name] + total if name in sums else total
    metrics = {}
    for name, total in sums.items():
        for key, value in overlap_means(total.tolist()).items():
            metrics[f"val/floor/overlap/{name}/{key.removeprefix('overlap/')}"] = value
    return metrics, [why] if why else []


def fitted_tables(
    model: DeepseekV3MTP, source: Source, config: Config, *, count: int, device: torch.device
) -> tuple[TableDrafters | None, str]:
    """`TableDrafters`, fitted on other windows than the `count` of the validation; and what of them
    could not be had, "" if nothing.
    """
    length, micro = config.data.seq_len, config.train.micro_batch_size
    windows: Any = {"seq_len": length, "lookahead": model.lookahead}
    spare = spare_windows(source, **windows, count=count, most=max(1, FIT_SLOTS // length))
    if not len(spare[0]):
        why = f"{source.path} has no window beside the {count} of the validation"
        return None, f"no table drafters: {why}"
    reads = [model.mtp.horizon(model.mtp_config, depth) for depth in range(1, 1 + model.depths)]
    tables = TableDrafters(reads, model.offsets[1:], config.model.vocab_size, device=device)
    for start in range(0, len(spare[0]), micro):
        rows = (array[start : start + micro] for array in spare)
        tokens, documents, _ = to_device(*rows, config=config, device=device)
        tables.fit(model.lm_head.head_logits, main_states(model, tokens, documents), tokens)
    if tables.has_tables:
        return tables, ""
    return tables, "no table drafter: a table of V x V entries is too large for this vocabulary"


def main_states(model: DeepseekV3MTP, tokens: Tensor, documents: Tensor | None) -> Tensor:
    """(B, T+1+D) -> (B, T, C) normed states of the main head, without the extra heads."""
    angles, mask = model.positions(tokens, documents)
    embedded = model.model.embed_tokens(tokens[:, : angles.shape[1]])
    return model.model(embedded, angles, mask)[0].post_norm


@torch.no_grad()
def draft_statistics(
    model: DeepseekV3MTP,
    source: Source,
    config: Config,
    *,
    batches: int,
    temperature: float,
    device: torch.device,
    vocab: Sequence[int] = (),
) -> dict[str, float]:
    """Metrics of `DraftStatistics` at a temperature, on the validation windows of `source`. vocab:
    the tokens that drafts are drawn among; (): all.
    """
    micro = config.train.micro_batch_size
    size = config.model.vocab_size
    outside = torch.ones(size, dtype=torch.bool, device=device)
    outside[list(vocab) or slice(None)] = False
    how: Any = {"temperature": temperature, "device": device, "outside": outside if vocab else None}
    statistics = DraftStatistics(model.offsets[1:], size, **how)
    windows = {"seq_len": config.data.seq_len, "lookahead": model.lookahead}
    windows |= {"count": batches * micro}
    for window in sequential_windows(source, **windows, micro_batch_size=micro):
        tokens, documents, scored = to_device(*window, config=config, device=device)
        output = model.head_rows(tokens, documents)
        states = output.by_depth(model.depths)
        taught = output.scored_slots(taught_slots(model, tokens, documents, scored), first=1)
        confidence = model.mtp.confidence(output)
        statistics.add(model.lm_head.head_logits, states, tokens, taught, confidence)
    return statistics.metrics()


def recycled_overlaps(
    model: DeepseekV3MTP,
    source: Source,
    config: Config,
    *,
    batches: int,
    device: torch.device,
    seed: int = 0,
    **drafting: Any,
) -> tuple[dict[str, float], str]:
    """`drafts/overlap/k` of the drafts beyond the heads' own, which a module that is used again
    makes, at PLACES of every validation window of `source`; and a line that says so.

    Args:
        seed: of the places, the same in all windows of a micro-batch.
        drafting: `draft_depth`, `temperature`, `recycle`, `draft_vocab` of `Settings`.
    """
    if config.data.mask_documents or config.data.mask != "none":
        why = "data.mask_documents or data.mask: decoding reads and drafts a whole text"
        return {}, f"no overlap of drafts beyond D ({why})"
    micro, length = config.train.micro_batch_size, config.data.seq_len
    settings = Settings(**drafting)
    with torch.inference_mode():
        decoder = Decoder(model, draft_vocab=settings.draft_vocab)
    windows: Any = {"seq_len": length, "lookahead": 1 + settings.draft_depth}
    windows |= {"count": batches * micro, "micro_batch_size": micro}
    generator, found = torch.Generator().manual_seed(seed), []
    for window in sequential_windows(source, **windows):
        tokens, *_ = to_device(*window, config=config, device=device)
        places = torch.randperm(length, generator=generator)[:PLACES] + 1
        found += [forced_overlap(decoder, tokens, place, settings) for place in places.tolist()]
    overlap, own = torch.cat(found), config.mtp.drafts  # (N, K)
    means = enumerate(overlap.mean(0).tolist(), start=1)
    note = (
        f"drafts/overlap/{own + 1} and beyond: of modules used again (--recycle "
        f"{settings.recycle or 'last'}), the text's own tokens between, at {len(overlap)} places"
    )
    return {f"drafts/overlap/{k}": value for k, value in means if k > own}, note


def taught_slots(
    model: DeepseekV3MTP, tokens: Tensor, documents: Tensor | None, scored: Tensor | None
) -> Tensor:
    """(D, B, T) bool: the slots that have a teacher."""
    valid = valid_targets(tokens, documents, model.offsets, scored)
    return teacher_slots(valid, model.offsets)
