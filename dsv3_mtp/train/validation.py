"""Validation: the same windows at every evaluation and for every number of ranks; evaluation of
finished models.

`evaluate` belongs to the trainer; tools/evaluate.py calls `open_model`, `validate` and
`acceptance`.
"""

import math
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor

from dsv3_mtp.config import Config, ConfigError
from dsv3_mtp.config.reader import problems_of
from dsv3_mtp.config.task import Generate
from dsv3_mtp.data.sampler import sequential_windows, windows_of_rank
from dsv3_mtp.data.source import DataSource
from dsv3_mtp.decode.generate import Settings, generate
from dsv3_mtp.hf import load_hf
from dsv3_mtp.model.causal_lm import DeepseekV3MTP
from dsv3_mtp.model.output import MTPOutput
from dsv3_mtp.model.overlap import overlap_means
from dsv3_mtp.runs.model import load_model

if TYPE_CHECKING:  # evaluating a model needs no DeepSpeed
    from dsv3_mtp.parallel.engine import Engine


def evaluate(engine: "Engine", source: DataSource, config: Config) -> dict[str, Any]:
    """`validate` in a training run: all ranks share the work and get the same metrics."""
    world = engine.world
    return validate(
        engine,
        source,
        config,
        batches=config.eval.batches,
        device=world.device,
        rank=world.data_rank,
        world_size=world.data_size,
        all_reduce=engine.all_reduce,
    )


def validate(
    model: "DeepseekV3MTP | Engine",
    source: DataSource,
    config: Config,
    *,
    batches: int,
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
    all_reduce: Callable[[Tensor], Tensor] = lambda sums: sums,
) -> dict[str, Any]:
    """Losses, top1, agreement and overlap of every depth on `batches` fixed micro-batches of
    train.micro_batch_size sequences.

    Returns `val/...` metrics, summed over ranks before dividing. `val/main_loss` is the validation
    loss (nats per token); `val/bits_per_byte` is the same per byte of text, comparable between
    tokenizers. For a task also its `task/...` metrics, on the examples of the same rows.
    """
    depths, micro, count = (
        config.mtp.depths,
        config.train.micro_batch_size,
        batches * config.train.micro_batch_size,
    )
    share = {"rank": rank, "world_size": world_size, "micro_batch_size": micro}
    windows = sequential_windows(
        source, seq_len=config.data.seq_len, lookahead=config.mtp.lookahead, count=count, **share
    )
    batch = [to_device(*window, config=config, device=device) for window in windows]
    # every rank computes as often: they may share experts or weights
    blanks = -(-batches // world_size) - len(batch)
    blank = np.zeros((micro, config.data.seq_len + config.mtp.lookahead), np.int64)
    batch += [to_device(blank, blank, config=config, device=device)] * blanks
    sums = metric_sums(model.evaluate(batch, blanks=blanks))
    grade = None
    if source.task is not None:
        rows = [row for part in windows_of_rank(count, **share) for row in part]
        whole = model if isinstance(model, DeepseekV3MTP) else model.model
        grade = source.task.grading(config.data.seq_len, config.mtp, greedy(whole))
        grade.mark(rows, windows)
        sums = torch.cat([sums, torch.from_numpy(grade.sums).to(device)])
    own = len(sums) if grade is None else len(sums) - len(grade.sums)
    totals = all_reduce(sums).tolist()
    means = metric_means(totals[:own], depths, config.mtp.term_names)
    metrics = {f"val/{name}": value for name, value in means.items()}
    if grade is not None:
        metrics |= grade.metrics(totals[own:], metrics)
    if source.bytes is not None and source.tokens is not None:
        targets = source.tokens if source.text is None else source.text.targets
        metrics["val/bits_per_byte"] = (
            metrics["val/main_loss"] / math.log(2) * targets / source.bytes
        )
    return metrics


def greedy(model: DeepseekV3MTP) -> Generate:
    """How a task asks the model for its answers."""
    return lambda prompts, tokens: generate(model, prompts, Settings(max_new_tokens=tokens)).tokens


def to_device(tokens, documents, scored=None, *, config: Config, device: torch.device):
    """One micro-batch of the sampler as the model takes it: tokens, documents only where they are
    to be masked, and which tokens are targets (None: all of a text).
    """
    numbers = documents if config.data.mask_documents else None
    return tuple(
        None if part is None else torch.from_numpy(part).to(device)
        for part in (tokens, numbers, scored)
    )


def metric_sums(out: MTPOutput) -> torch.Tensor:
    """(3+9D+2n,) float64 [nll 1+D | targets 1+D | correct 1+D | agreed D | compared D | overlap 4 D
    | sums and counts of the n terms]: adds up over batches and ranks.
    """
    counts = (out.nll_sum, out.targets, out.correct, out.agreed, out.compared, out.overlap)
    return torch.cat([x.double().flatten() for x in (*counts, out.term_sum, out.term_count)])


def metric_means(sums: list[float], depths: int, terms: Sequence[str] = ()) -> dict[str, float]:
    """Names and ratios of `metric_sums`: main_loss, mtp_loss/k, top1/0..D, agreement/k,
    overlap/k, overlap/tokens_per_step, and those of `MTPConfig.term_names`.

    A depth without a valid target (masked documents shorter than it reaches) has no entry.
    """
    heads = 1 + depths
    nll, targets, correct = sums[:heads], sums[heads : 2 * heads], sums[2 * heads : 3 * heads]
    agreed, compared, *overlap = (sums[3 * heads + n * depths :][:depths] for n in range(6))
    values, counts = (sums[3 * heads + 6 * depths + n * len(terms) :][: len(terms)] for n in (0, 1))
    losses = [value / max(count, 1) for value, count in zip(nll, targets, strict=True)]
    metrics = {"main_loss": losses[0]}
    metrics |= {f"mtp_loss/{depth}": losses[depth] for depth in range(1, heads) if targets[depth]}
    metrics |= {
        f"top1/{depth}": correct[depth] / targets[depth] for depth in range(heads) if targets[depth]
    }
    metrics |= {f"agreement/{k + 1}": agreed[k] / compared[k] for k in range(depths) if compared[k]}
    rest = zip(terms, values, counts, strict=True)
    metrics |= {name: value / count for name, value, count in rest if count}
    return metrics | overlap_means(overlap)


def open_model(
    *,
    run: str | None,
    hf: str | None,
    seq_len: int | None,
    micro_batch_size: int | None,
    ema: bool = False,
    trust_code: bool = False,
) -> tuple[DeepseekV3MTP, Config]:
    """The model of a run, or of a folder in DeepSeek-V3's layout, and the config that `validate`
    reads.

    Args:
        seq_len: tokens per window; None: the run's, for a folder the model's longest, at most 4096.
        micro_batch_size: sequences per forward; None: the run's, for a folder 1.
        ema: of a run, the moving average of the weights.
        trust_code: import what the run's config names as package.module:Class.

    Raises:
        ValueError: there is nothing to load, or the windows do not fit the model or the task.
    """
    if run is not None:
        model, config, _, notes = load_model(run, ema=ema, trust_code=trust_code)
        for note in notes:
            print(f"note: {note}", file=sys.stderr)
        sections = config.to_dict()
    else:
        model, _ = load_hf(hf or "")
        longest = model.config.max_position_embeddings
        sections = {
            "model": model.config.model_dump(),
            "mtp": model.mtp_config.model_dump(mode="json"),
        }
        sections["data"] = {"train": "none", "val": "none", "seq_len": min(4096, longest)}
        sections["train"] = {"micro_batch_size": 1}
    longest = sections["model"]["max_position_embeddings"]
    if seq_len is not None:
        sections["data"]["seq_len"] = seq_len
    if not 2 <= sections["data"]["seq_len"] <= longest:
        raise ValueError(
            f"--seq-len {seq_len}: must be 2 .. model.max_position_embeddings = {longest}"
        )
    micro = micro_batch_size or sections["train"]["micro_batch_size"]
    # The rules between batch size, total tokens and layout are about training: these values meet
    # all of them.
    length = {
        "micro_batch_size": micro,
        "batch_size": micro,
        "batch_size_ramp": None,
        "total_tokens": 2**62,
    }
    sections |= {"train": sections["train"] | length, "parallel": {}}
    try:
        return model, Config.model_validate(sections)
    except ValidationError as error:
        raise ConfigError(
            f"evaluation of {run or hf}", problems_of(error, sections, Config)
        ) from None


def acceptance(
    model: DeepseekV3MTP,
    source: DataSource,
    *,
    depth: int,
    prompts: int,
    seq_len: int,
    new_tokens: int,
    temperature: float = 0.0,
    part: tuple[int, int] = (0, 1),
    seed: int = 0,
    **drafting: Any,
) -> dict[str, float]:
    """Free-running acceptance of drafts of `depth` tokens on prompts from the source.

    A prompt is half a window of seq_len tokens, shorter where `new_tokens` need the room. On a task
    it is the text before an answer, and the answers are decoded; those of one or two tokens have
    nothing to draft: the first comes with the prompt, the last of a step from the main head.
    Returns `val/acceptance/k`, joint for drafts 1..k over the steps that put k drafts to the test,
    `val/tokens_per_step`, with a threshold `val/drafts_per_step`, and `val/distinct`, the share of
    distinct tokens: a model that repeats itself accepts everything.

    Args:
        part: (first, step): only every `step`-th of the prompts, from number `first` on.
        seed: of the random numbers at a temperature.
        drafting: `recycle`, `draft_threshold` and `draft_vocab` of `Settings`.

    Raises:
        ValueError: `new_tokens` leave no room for a prompt.
    """
    asked = source.task.prompts(prompts) if source.task is not None else None
    if asked is not None:
        texts, new_tokens = asked
    else:
        length = min(seq_len // 2, model.config.max_position_embeddings - new_tokens)
        if length < 1:
            raise ValueError(
                f"{new_tokens} new tokens leave no room for a prompt; give fewer (--new-tokens)"
            )
        windows = sequential_windows(source, seq_len=length, lookahead=0, count=prompts)
        texts = windows[0][0].tolist()
    if new_tokens < 3:
        return {}
    settings = Settings(
        max_new_tokens=new_tokens, draft_depth=depth, temperature=temperature, seed=seed, **drafting
    )
    out = generate(model, texts[part[0] :: part[1]], settings)
    metrics = {
        f"val/acceptance/{k}": share for k, share in enumerate(out.acceptance.joint, start=1)
    }
    metrics["val/tokens_per_step"] = out.acceptance.tokens_per_step
    if settings.draft_threshold:
        metrics["val/drafts_per_step"] = sum(out.acceptance.tried) / max(out.acceptance.steps, 1)
    return metrics | {"val/distinct": out.distinct}
