"""All analyses of one run, or of one beside another on the same windows: `dsv3 analyse`."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dsv3_mtp.analysis.angles import gradient_angles
from dsv3_mtp.analysis.classes import is_python, target_classes
from dsv3_mtp.analysis.groups import Groups, entropy_groups, position_groups, rows_of
from dsv3_mtp.analysis.intervals import Estimate, estimate
from dsv3_mtp.analysis.probe import FIT_SLOTS, MOST_ENTRIES, OFFSETS, Probed, probe
from dsv3_mtp.analysis.routers import Shared, shared_experts
from dsv3_mtp.analysis.slots import Slots, read_slots
from dsv3_mtp.config import Config
from dsv3_mtp.data.sampler import sequential_windows, spare_windows
from dsv3_mtp.data.source import Source
from dsv3_mtp.data.tokenizer import recorded_encoder
from dsv3_mtp.files.run_folder import newest_checkpoint, read_reached, tokenizer_of
from dsv3_mtp.model.causal_lm import DeepseekV3MTP
from dsv3_mtp.model.moe import MoE
from dsv3_mtp.report.metrics import read_metrics
from dsv3_mtp.train.floors import fitted_tables, readable_training, text_tables


@dataclass(frozen=True)
class Subject:
    """A run that is analysed."""

    folder: Path
    model: DeepseekV3MTP
    config: Config  # of `open_model`


@dataclass
class Analysis:
    """What was found. `notes` say what could not be had, and why."""

    run: str
    against: str | None
    tokens: int  # that the run has consumed
    data: str
    windows: int
    window_tokens: int
    classes_by: str | None = None  # what decides the class of a token
    groups: dict[str, Groups] = field(default_factory=dict)
    probes: dict[int, dict[str, Estimate]] = field(default_factory=dict)
    routers: list[Shared] = field(default_factory=list)
    gradients: list[dict[str, float]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Read:
    """What one run makes of the measured windows, and of those that probes are fitted on."""

    slots: Slots
    spare: Slots | None


def analyse(
    subject: Subject,
    other: Subject | None,
    source: Source,
    *,
    batches: int,
    device: torch.device,
    trust_code: bool = False,
) -> Analysis:
    """Raises ValueError: the runs cannot be read on the same windows."""
    config = subject.config
    if other is not None:
        comparable(subject, other)
    count = batches * config.train.micro_batch_size
    reached = newest_checkpoint(subject.folder / "checkpoints")
    found = Analysis(
        run=str(subject.folder),
        against=None if other is None else str(other.folder),
        tokens=0 if reached is None else read_reached(reached)["tokens"],
        data=source.path,
        windows=count,
        window_tokens=config.data.seq_len,
    )
    ours = read(subject, source, count, device, found.notes, trust_code)
    theirs = read(other, source, count, device, [], trust_code) if other else None
    beside = theirs.slots if theirs else None
    found.groups = group_all(found, subject, source, ours.slots, beside)
    found.probes = probe_all(found, config.model.vocab_size, ours, theirs)
    layers = moe_layers(subject.model)
    found.routers = shared_experts(ours.slots, layers, config.model.n_routed_experts)
    if not found.routers:
        found.notes.append("no routers to compare: not every depth has one, or the trunk has none")
    metrics = subject.folder / "metrics.jsonl"
    found.gradients = gradient_angles(read_metrics(metrics) if metrics.is_file() else [])
    if not found.gradients:
        found.notes.append("no gradient angles: train with log.gradients, heads and no detach")
    return found


def moe_layers(model: DeepseekV3MTP) -> list[int]:
    """Numbers of the trunk layers that have a router."""
    blocks: Any = enumerate(model.model.layers)
    return [number for number, block in blocks if isinstance(block.mlp, MoE)]


def comparable(subject: Subject, other: Subject) -> None:
    """Raises ValueError where two runs cannot be read on the same windows."""
    mine, its = subject.config, other.config
    for key, own, value in (
        ("model.vocab_size", mine.model.vocab_size, its.model.vocab_size),
        ("data.seq_len", mine.data.seq_len, its.data.seq_len),
        ("data.mask_documents", mine.data.mask_documents, its.data.mask_documents),
    ):
        if own != value:
            raise ValueError(
                f"--against {other.folder}: {key} is {value}, of {subject.folder} {own}; the same "
                "windows are needed, so that it must be the same"
            )


def read(
    subject: Subject,
    source: Source,
    count: int,
    device: torch.device,
    notes: list[str],
    trust_code: bool,
) -> Read:
    """Notes get what could not be had."""
    model, config = subject.model, subject.config
    size: Any = {"seq_len": config.data.seq_len, "lookahead": model.lookahead, "count": count}
    tables = None
    if model.depths:
        tables, why = fitted_tables(model, source, config, count=count, device=device)
        notes += [why] if why else []
    trained, lost = readable_training(subject.folder, trust_code=trust_code)
    trigrams, missing = text_tables(trained, config) if trained is not None else (None, None)
    notes += [*lost, *([missing] if missing else [])]
    micro = config.train.micro_batch_size
    windows = sequential_windows(source, **size, micro_batch_size=micro)
    how: Any = {"config": config, "device": device}
    slots = read_slots(model, windows, tables=tables, trigrams=trigrams, **how)
    most = max(2, FIT_SLOTS // config.data.seq_len)
    rows = spare_windows(source, **size, most=most)
    starts = range(0, len(rows[0]), micro)
    parts = [tuple(array[start : start + micro] for array in rows) for start in starts]
    return Read(slots, read_slots(model, parts, **how) if len(rows[0]) > 1 else None)


def group_all(
    found: Analysis, subject: Subject, source: Source, slots: Slots, beside: Slots | None
) -> dict[str, Groups]:
    """By class, by entropy, by place."""
    groups, length = {}, found.window_tokens
    path = tokenizer_of(subject.config, subject.folder)
    if path is None:
        found.notes.append("no token classes: there is no tokenizer.json beside the run's data")
    else:
        stream = source.stream(length, None)
        starts = [stream.place(n, found.windows) * length for n in range(found.windows)]
        encoder = recorded_encoder(path, subject.config.model.vocab_size)
        names, classes = target_classes(source, starts, length, encoder)
        groups["class"] = rows_of(slots, names, classes, beside)
        python = is_python(source.path)
        found.classes_by = "Python's tokenizer" if python else "characters"
        if not python:
            text = "is not known to be Python code (dsv3 prepare --corpus, or --input of .py files)"
            found.notes.append(f"{source.path} {text}: the classes are those of characters")
    groups["entropy"] = rows_of(slots, *entropy_groups(slots.array("entropy")), beside)
    groups["position"] = rows_of(slots, *position_groups(found.windows, length), beside)
    return groups


def probe_all(
    found: Analysis, vocab_size: int, ours: Read, theirs: Read | None
) -> dict[int, dict[str, Estimate]]:
    """Offset -> probe, table, unigram in nats, and how much less than another run's probe."""
    if ours.spare is None or (theirs is not None and theirs.spare is None):
        found.notes.append("no probes: there are no other windows of the text to fit them on")
    elif found.window_tokens < 2 * OFFSETS[-1]:
        found.notes.append(f"no probes: windows of {found.window_tokens} tokens are too short")
    elif FIT_SLOTS * vocab_size > MOST_ENTRIES:
        found.notes.append(f"no probes: {vocab_size:,} tokens in the vocabulary are too many")
    else:
        runs = [ours, theirs] if theirs else [ours]
        probed = {k: [_probe(one, k, vocab_size) for one in runs] for k in OFFSETS}
        return {k: probe_columns(found, k, *each) for k, each in probed.items()}
    return {}


def _probe(one: Read, offset: int, vocab_size: int) -> Probed:
    assert one.spare is not None
    parts = [part.array(name) for part in (one.spare, one.slots) for name in ("states", "tokens")]
    return probe(*parts, offset=offset, vocab_size=vocab_size)


def probe_columns(found: Analysis, offset: int, *probed: Probed) -> dict[str, Estimate]:
    ours = probed[0]
    columns = {"probe": ours.probe, "table": ours.table, "unigram": ours.unigram}
    if len(probed) > 1:
        columns["probe_minus"] = ours.probe - probed[1].probe
    worst = max(one.gradient for one in probed)
    if worst > 1e-3:
        found.notes.append(f"the probe of t+{offset} has not converged (gradient {worst:.1g})")
    everywhere = np.ones_like(ours.probe, bool)
    means = {name: estimate(x, everywhere) for name, x in columns.items()}
    return {name: value for name, value in means.items() if value is not None}


def as_json(found: Analysis) -> dict[str, Any]:
    """An `Estimate` becomes {mean, half, slots}."""

    def plain(value: Any) -> Any:
        if isinstance(value, Estimate | Shared):
            return {name: plain(part) for name, part in value._asdict().items()}
        if isinstance(value, dict):
            return {str(key): plain(part) for key, part in value.items()}
        if isinstance(value, Sequence) and not isinstance(value, str):
            return [plain(part) for part in value]
        return value

    return {name: plain(value) for name, value in vars(found).items()}
