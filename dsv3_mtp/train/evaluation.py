"""All that can be said of a trained model on one data source: `dsv3 evaluate`, `Run.evaluate`."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch

from dsv3_mtp.config import Config
from dsv3_mtp.data.ngrams import early_training
from dsv3_mtp.data.sampler import Sampler
from dsv3_mtp.data.source import DataSource
from dsv3_mtp.decode.draft import no_drafter
from dsv3_mtp.decode.generation import repetition
from dsv3_mtp.model.causal_lm import DeepseekV3MTP
from dsv3_mtp.train.floors import draft_statistics, drafter_floors, recycled_overlaps, text_floors
from dsv3_mtp.train.validation import acceptance, validate

NEW_TOKENS = 64  # behind each prompt, where the model can read so many


def evaluation(
    model: DeepseekV3MTP,
    source: DataSource,
    config: Config,
    *,
    batches: int,
    device: torch.device,
    trained: Sampler | None,
    prompts: int,
    new_tokens: int | None = None,
    temperature: float | None = None,
    drafts: bool = False,
    draft_depth: int | None = None,
    drafting: Mapping[str, Any] = MappingProxyType({}),
) -> tuple[dict[str, float], list[str]]:
    """Metrics by name (docs/metrics.md), and what a reader should know about them.

    Args:
        trained: the sampler of the run's training text, for the n-gram floors; None: none.
        prompts: for free-running acceptance; 0: it is not measured.
        temperature: of acceptance, None: greedy; and of the drafts' statistics, None: 1.
        drafts: the statistics of drafts along the text as well.
        draft_depth: drafts per step of acceptance, and of `drafts`, where beyond D modules are
            used again; None: the model's D.
        drafting: further `Settings` of acceptance, where they are asked for.

    Raises:
        ValueError: `drafts` of a task, whose answers are no text.
    """
    metrics = validate(model, source, config, batches=batches, device=device)
    notes: list[str | None] = []
    where: Any = {"batches": batches, "device": device}
    if (text := source.text) is not None:
        floors, missing = drafter_floors(model, text, config, **where)
        why = None
        if trained is not None:
            tables, why = text_floors(trained, text, config, batches=batches)
            metrics |= tables
        metrics |= floors
        notes += [early_training(metrics), why, *missing]
        if drafts:
            among = {"temperature": temperature or 1.0, "vocab": drafting.get("draft_vocab", ())}
            metrics |= draft_statistics(model, text, config, **among, **where)
            if draft_depth and draft_depth > config.mtp.drafts:
                ways = {key: drafting[key] for key in ("recycle", "draft_vocab") if key in drafting}
                ways |= {"draft_depth": draft_depth, "temperature": temperature or 1.0}
                beyond, why = recycled_overlaps(model, text, config, **ways, **where)
                metrics |= beyond
                notes.append(why)
    elif drafts:
        raise ValueError(f"--drafts: {source.path} is a task, whose answers are no text")
    if prompts and config.mtp.depths:
        asked: Any = {"prompts": prompts, "new_tokens": new_tokens}
        asked |= {"temperature": temperature or 0.0, "depth": draft_depth or config.mtp.drafts}
        found, why = _free_running(model, source, config, **asked, **drafting)
        metrics |= found
        notes.append(why)
    return metrics, [note for note in notes if note]


def _free_running(
    model: DeepseekV3MTP,
    source: DataSource,
    config: Config,
    *,
    new_tokens: int | None,
    **asked: Any,
) -> tuple[dict[str, float], str | None]:
    """Acceptance of text that the model writes, and what is to be said of it."""
    if why := no_drafter(config.mtp):
        return {}, f"{why}; acceptance is not measured"
    new_tokens = new_tokens or min(NEW_TOKENS, config.model.max_position_embeddings // 2)
    length = config.data.seq_len
    metrics = acceptance(model, source, seq_len=length, new_tokens=new_tokens, **asked)
    if source.text is None:  # a task's text may be of few tokens
        return metrics, None
    return metrics, repetition(metrics.get("val/distinct", 1.0))
