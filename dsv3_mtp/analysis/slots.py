"""A model along the windows of a text, slot by slot.

Everything is filed under the slot j of the main head, which predicts t_{j+1}. Depth k predicts that
token at slot j - (offset(k) - 1), so that the columns of one slot are about one token.

Shapes: W windows, T slots, D depths, C hidden_size, K experts per token, A + 1 = lookahead.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dsv3_mtp.config import Config
from dsv3_mtp.data.ngrams import Events, NGrams
from dsv3_mtp.data.sampler import RowBatch
from dsv3_mtp.model.causal_lm import DeepseekV3MTP
from dsv3_mtp.model.moe import Gate
from dsv3_mtp.model.overlap import chunks, log_probabilities, slot_overlaps
from dsv3_mtp.model.states import HeadOutput
from dsv3_mtp.model.targets import valid_targets
from dsv3_mtp.train.drafts import TableDrafters
from dsv3_mtp.train.floors import taught_slots
from dsv3_mtp.train.validation import to_device


@dataclass
class Slots:
    """What was read of some windows; the arrays are appended window by window."""

    tokens: list[np.ndarray] = field(default_factory=list)  # (T+1+A,)
    valid: list[np.ndarray] = field(default_factory=list)  # (T,) bool: t_{j+1} is a target
    loss: list[np.ndarray] = field(default_factory=list)  # (T,) of the main head, nats
    entropy: list[np.ndarray] = field(default_factory=list)  # (T,) of its distribution, nats
    states: list[np.ndarray] = field(default_factory=list)  # (T, C) that it reads
    taught: list[np.ndarray] = field(default_factory=list)  # (D, T) bool: depth k has this slot
    overlap: list[np.ndarray] = field(default_factory=list)  # (D, T)
    table: list[np.ndarray] = field(default_factory=list)  # (D, T) of a table drafter
    trigram: list[np.ndarray] = field(default_factory=list)  # (T,) nats
    trunk_experts: list[np.ndarray] = field(default_factory=list)  # (MoE layers, T, K)
    head_experts: list[np.ndarray] = field(default_factory=list)  # (D, T, K)

    def array(self, name: str) -> np.ndarray:
        """(W, ...) of one field."""
        return np.stack(getattr(self, name))


def at_main_slot(x: Tensor, offsets: Sequence[int], fill: Any) -> Tensor:
    """(D, B, T, ...) by the head's slot i -> by the main head's slot i + offset - 1."""
    moved = torch.full_like(x, fill)
    for depth, offset in enumerate(offsets[1:]):
        if (ahead := offset - 1) < x.shape[2]:
            moved[depth, :, ahead:] = x[depth, :, : x.shape[2] - ahead]
    return moved


@torch.no_grad()
def read_slots(
    model: DeepseekV3MTP,
    windows: Sequence[RowBatch],
    config: Config,
    *,
    device: torch.device,
    tables: TableDrafters | None = None,
    trigrams: NGrams | None = None,
) -> Slots:
    """windows: micro-batches of (tokens, documents[, scored]), each (B, T+1+A)."""
    found = Slots()
    for window in windows:
        tokens, documents, scored = to_device(*window, config=config, device=device)
        with watched(model) as calls:
            output = model.head_rows(tokens, documents)
        valid = valid_targets(tokens, documents, model.offsets, scored)
        hidden = output.by_depth(model.depths)[0]
        assert isinstance(hidden, Tensor)
        labels = tokens[:, 1 : 1 + hidden.shape[1]]
        loss, entropy = main_columns(model, hidden, labels)
        parts = {"tokens": tokens, "valid": valid[0], "loss": loss, "entropy": entropy}
        parts["states"] = hidden.float()
        if model.depths:
            taught = taught_slots(model, tokens, documents, scored)
            parts |= draft_columns(model, output, tokens, taught, tables)
            parts |= expert_columns(model, calls, tokens)
        for name, part in parts.items():
            getattr(found, name).extend(part.cpu().numpy())
        if trigrams is not None:
            found.trigram.extend(trigram_losses(trigrams, window, config))
    return found


def main_columns(model: DeepseekV3MTP, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and entropy of the main head, (B, T) each."""
    columns = []
    for start, stop in chunks(0, hidden.shape[1], len(hidden), model.config.vocab_size):
        log_p = log_probabilities(model.lm_head(hidden[:, start:stop]), 1.0)
        loss = -log_p.gather(-1, labels[:, start:stop, None])[..., 0]
        columns.append(torch.stack([loss, -(log_p.exp() * log_p).sum(-1)]).double())
    loss, entropy = torch.cat(columns, dim=2)
    return loss, entropy


def draft_columns(
    model: DeepseekV3MTP,
    output: HeadOutput,
    tokens: Tensor,
    taught: Tensor,
    tables: TableDrafters | None,
) -> dict[str, Tensor]:
    """Overlap of the heads and of table drafters with the main head, (B, D, T)."""
    states = output.by_depth(model.depths)
    taught = output.scored_slots(taught.clone(), first=1)
    hidden: Any = states[0]
    nothing = hidden.new_zeros(len(tokens), max(model.offsets) - 1, *hidden.shape[2:])
    logits, size = model.lm_head.head_logits, model.config.vocab_size
    columns = {"overlap": slot_overlaps(logits, states, nothing, taught, size, model.offsets)}
    if tables is not None and tables.has_tables:
        columns["table"] = tables.overlaps(logits, hidden, tokens, taught)["table"]
    moved = {n: at_main_slot(x, model.offsets, float("nan")) for n, x in columns.items()}
    moved["taught"] = at_main_slot(taught, model.offsets, False)
    return {name: x.transpose(0, 1) for name, x in moved.items()}


def trigram_losses(tables: NGrams, window: RowBatch, config: Config) -> np.ndarray:
    """(B, T) nats of the trigram table, 0 where documents are masked and there is no target."""
    length = config.data.seq_len
    tokens, documents = window[0][:, : length + 1], window[1][:, : length + 1]
    masked = documents if config.data.mask_documents else None
    there = documents[:, 1:] == documents[:, :-1] if config.data.mask_documents else None
    probability = tables.probabilities(Events.of(tokens, masked, tables.vocab_size))[-1]
    losses = np.zeros((len(tokens), length))
    losses[there if there is not None else np.ones_like(losses, bool)] = -np.log(probability)
    return losses


@contextmanager
def watched(model: DeepseekV3MTP) -> Iterator[dict[str, list[Tensor]]]:
    """What the routers choose meanwhile, (N, K) per call: {"trunk": ..., "heads": ...}."""
    calls: dict[str, list[Tensor]] = {"trunk": [], "heads": []}
    hooks = []
    for part, kind in ((model.model, "trunk"), (model.mtp, "heads")):
        for module in part.modules() if part is not None else ():
            if isinstance(module, Gate):

                def note(_module: Any, _inputs: Any, found: Any, kind: str = kind) -> None:
                    calls[kind].append(found[0])

                hooks.append(module.register_forward_hook(note))
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def expert_columns(
    model: DeepseekV3MTP, calls: dict[str, list[Tensor]], tokens: Tensor
) -> dict[str, Tensor]:
    """The experts of trunk layers and depths, (B, routers, T, K); -1 where a depth has no slot.
    {} unless every depth has one router.
    """
    if not calls["trunk"] or len(calls["heads"]) != model.depths:
        return {}
    rows = len(tokens)
    trunk, heads = (
        torch.stack([x.view(rows, -1, x.shape[1]) for x in part])
        for part in (calls["trunk"], calls["heads"])
    )
    moved = at_main_slot(heads, model.offsets, -1)
    return {"trunk_experts": trunk.transpose(0, 1), "head_experts": moved.transpose(0, 1)}
