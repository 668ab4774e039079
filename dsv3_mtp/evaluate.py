"""Validation: the same windows at every evaluation and for every number of ranks."""

import math
from typing import Any

import torch

from dsv3_mtp.config import Config
from dsv3_mtp.data.sampler import sequential_windows
from dsv3_mtp.data.source import Source
from dsv3_mtp.model.causal_lm import MTPOutput
from dsv3_mtp.parallel.engine import Engine


@torch.no_grad()
def evaluate(engine: Engine, source: Source, config: Config) -> dict[str, Any]:
    """Losses, top1 and agreement of every depth on `eval.batches` fixed micro-batches of the val split.

    Returns `val/...` metrics, summed over ranks before dividing. `val/main_loss` is the validation loss (nats per
    token); `val/bits_per_byte` is the same per byte of text, comparable between tokenizers.
    """
    depths, micro = config.mtp.depths, config.train.micro_batch_size
    batches = sequential_windows(
        source,
        seq_len=config.data.seq_len,
        lookahead=1 + depths,
        count=config.eval.batches * micro,
        rank=engine.world.rank,
        world_size=engine.world.size,
        micro_batch_size=micro,
    )
    sums = torch.zeros(3 + 5 * depths, dtype=torch.float64, device=engine.world.device)
    engine.module.eval()
    for tokens, documents in batches:
        out = engine.module(*to_device(tokens, documents, config=config, device=engine.world.device))
        sums += metric_sums(out)
    engine.module.train()
    metrics = {f"val/{name}": value for name, value in metric_means(engine.all_reduce(sums).tolist(), depths).items()}
    if source.bytes is not None:
        metrics["val/bits_per_byte"] = metrics["val/main_loss"] / math.log(2) * source.tokens / source.bytes
    return metrics


def to_device(tokens, documents, *, config: Config, device: torch.device):
    """One micro-batch of the sampler as the model takes it; documents only where they are to be masked."""
    tokens = torch.from_numpy(tokens).to(device)
    return tokens, torch.from_numpy(documents).to(device) if config.data.mask_documents else None


def metric_sums(out: MTPOutput) -> torch.Tensor:
    """(3+5D,) float64 [nll 1+D | targets 1+D | correct 1+D | agreed D | compared D]: adds up over batches and ranks."""
    return torch.cat([part.double() for part in (out.nll_sum, out.targets, out.correct, out.agreed, out.compared)])


def metric_means(sums: list[float], depths: int) -> dict[str, float]:
    """Names and ratios of `metric_sums`: main_loss, mtp_loss/k, top1/0..D, agreement/k.

    A depth without a valid target (masked documents shorter than it reaches) has no entry.
    """
    heads = 1 + depths
    nll, targets, correct = sums[:heads], sums[heads : 2 * heads], sums[2 * heads : 3 * heads]
    agreed, compared = sums[3 * heads : 3 * heads + depths], sums[3 * heads + depths :]
    losses = [value / max(count, 1) for value, count in zip(nll, targets, strict=True)]
    metrics = {"main_loss": losses[0]}
    metrics |= {f"mtp_loss/{depth}": losses[depth] for depth in range(1, heads) if targets[depth]}
    metrics |= {f"top1/{depth}": correct[depth] / targets[depth] for depth in range(heads) if targets[depth]}
    metrics |= {f"agreement/{k + 1}": agreed[k] / compared[k] for k in range(depths) if compared[k]}
    return metrics
