"""The run folder, besides metrics and checkpoints, and what may change between two starts.

runs/NAME/  config.yaml  ds_config.json  manifest.json  metrics.jsonl  curves.png  tb/  checkpoints/
"""

import importlib.metadata
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any, NotRequired

import torch
from pydantic import Field, with_config
from typing_extensions import TypedDict

from dsv3_mtp.config import Config, MTPConfig, code
from dsv3_mtp.config.resume import FREE, differences, rule_of
from dsv3_mtp.config.section import OnResume
from dsv3_mtp.data.source import DataSource
from dsv3_mtp.files.atomic import lock, sweep, write_json, write_text
from dsv3_mtp.files.checked import OPEN, read_json
from dsv3_mtp.files.run_folder import checkpoints, is_complete, newest_checkpoint
from dsv3_mtp.report.metrics import read_metrics

PACKAGES = ("torch", "deepspeed", "numpy", "tokenizers", "transformer-engine", "flash-attn")
MANIFEST = "manifest.json"


@with_config(OPEN)
class DataUsed(TypedDict):
    """A data source of a start."""

    path: str
    manifest_hash: str


@with_config(OPEN)
class Start(TypedDict):
    """What a report says of a start; `describe_start` writes more."""

    time: str
    git: str | None
    git_dirty: bool
    python: str
    versions: dict[str, str | None]
    device: str
    threads: int
    data: dict[str, DataUsed]
    code: NotRequired[dict[str, str]]  # SHA-256 of each source file outside the package


@with_config(OPEN)
class Manifest(TypedDict):
    """manifest.json: what each start of the run ran with."""

    starts: Annotated[list[Start], Field(min_length=1)]


def run_folder(config: Config) -> Path:
    return Path(config.run.dir) / config.run.name


def lock_folder(folder: Path) -> int:
    """Holds the folder for this process until it ends, or until the returned descriptor is closed.
    What a killed process left half-written there is deleted. Raises ValueError: another process
    holds it, or it cannot be made.
    """
    busy = f"{folder}: another process works in this folder; choose another run.name"
    try:
        descriptor = lock(folder / ".lock", busy)
    except OSError as error:
        text = f"{str(folder)!r} cannot be written ({error.strerror}); choose another"
        raise ValueError(f"run.dir, run.name: {text}") from None
    for left in (folder, folder / "checkpoints", *checkpoints(folder / "checkpoints")):
        sweep(left)
    return descriptor


def find_checkpoints(config: Config) -> tuple[list[Path], list[str]]:
    """The complete checkpoints of the run, the newest first, and what to say of others. Raises
    ValueError: `checkpoint.resume: never` and there is one; or all are damaged.
    """
    root = run_folder(config) / "checkpoints"
    _read_back(run_folder(config))
    newest = newest_checkpoint(root)
    if newest is not None and config.checkpoint.resume == "never":
        remedy = "choose another run.name or delete the folder"
        raise ValueError(f"checkpoint.resume: never, but {newest} exists; {remedy}")
    damaged = [folder for folder in checkpoints(root) if not is_complete(folder)]
    if newest is None and (root / "latest").exists():
        raise ValueError(
            f"{root}: no checkpoint in it is complete any more; delete the run folder to start "
            "again, or choose another run.name"
        )
    complete = [folder for folder in reversed(checkpoints(root)) if folder not in damaged]
    text = "is incomplete: not used, and deleted at the next save"
    return complete, [f"{folder} {text}" for folder in damaged]


def _read_back(folder: Path) -> None:
    """Raises ValueError where a file is damaged that this start will read at its end only."""
    if (folder / MANIFEST).exists():
        read_starts(folder)
    if (folder / "metrics.jsonl").exists():
        read_metrics(folder / "metrics.jsonl")


def write_run_folder(
    config: Config,
    ds_config: dict[str, Any],
    *,
    world_size: int,
    command: list[str],
    sources: dict[str, DataSource],
    step: int,
) -> None:
    """config.yaml (resolved), ds_config.json, and one more entry in manifest.json for this start,
    which trains from `step` on. The entry keeps the whole config: the next start may change some of
    it, and config.yaml is that of the last start that trained.
    """
    folder = run_folder(config)
    manifest = folder / MANIFEST
    starts: list[Any] = [*read_starts(folder)] if manifest.exists() else []
    start = describe_start(world_size=world_size, command=command, sources=sources)
    start |= {"step": step, "config": config.to_dict(), "code": code.hashes(config.to_dict())}
    starts.append(start)
    write_text(folder / "config.yaml", config.to_yaml())
    write_json(folder / "ds_config.json", ds_config)
    write_json(manifest, {"starts": starts})


def read_starts(folder: Path) -> list[Start]:
    """What manifest.json says of every start. Raises ValueError: it is missing or damaged."""
    remedy = "delete this file: it describes the starts of the run, and the next one writes it anew"
    return read_json(folder / MANIFEST, Manifest, remedy)["starts"]


def describe_start(
    *, world_size: int, command: list[str], sources: dict[str, DataSource]
) -> dict[str, Any]:
    """Versions, command, git commit, hardware, and the hash of every data source or task."""
    cuda, keys = torch.cuda.is_available(), ("path", "manifest_hash", "tokens", "documents")
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": command,
        "git": _git("rev-parse", "HEAD"),
        "git_dirty": _git_dirty(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name() if cuda else _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "world_size": world_size,
        "data": {role: {key: getattr(s, key) for key in keys} for role, s in sources.items()},
    }


def changed_settings(
    saved: dict[str, Any], config: Config, checkpoint: Path, *, finished: bool
) -> list[str]:
    """One line per setting that differs from the checkpoint's and may.

    finished: no step is left to train with the config.

    Raises:
        ValueError: settings differ that the checkpoint's weights or place in the data depend on; or
            the run is finished, and would not be trained with those that differ. All are listed.
    """
    changes = differences(_without_defaults(saved, config), config.to_dict(), ignoring=FREE)
    lines = {key: f"{key}: {old} -> {new}" for key, (old, new) in changes.items()}
    fixed = [line for key, line in lines.items() if _rule(key) is OnResume.FIXED]
    if fixed:
        text = f"{checkpoint} does not fit this config; restore these settings, or give the run"
        raise ValueError("\n  ".join([f"{text} another run.name:", *fixed]))
    if finished and lines:
        text = (
            f"{checkpoint.parents[1]} is finished and was trained with other settings; give the "
            "run another run.name, or a larger train.total_tokens to go on with these:"
        )
        raise ValueError("\n  ".join([text, *lines.values()]))
    return [f"changed since the checkpoint: {line}" for line in lines.values()]


def _rule(key: str) -> OnResume:
    """Of a key that may be of an older version, which is then one that the weights depend on."""
    try:
        return rule_of(key)
    except KeyError:
        return OnResume.FIXED


def _without_defaults(saved: dict[str, Any], config: Config) -> dict[str, Any]:
    """A saved config as this version would save it: without the keys of other kinds of heads, and
    with options of this kind that it did not have yet at their defaults.
    """
    mtp = saved.get("mtp", {})
    if mtp.get("mode") != config.mtp.mode:
        return saved
    common = {key: value for key, value in mtp.items() if key in MTPConfig.model_fields}
    own = config.mtp.kind.Options().model_dump(mode="json") if config.mtp.depths else {}
    return saved | {"mtp": common | {key: mtp.get(key, default) for key, default in own.items()}}


def changed_code(config: Config) -> list[str]:
    """One line for each class outside the package whose source is not that of the last start."""
    folder = run_folder(config)
    starts = read_starts(folder) if (folder / MANIFEST).exists() else []
    before = starts[-1].get("code", {}) if starts else {}
    return [
        f"changed since the last start: the source of {name}"
        for name, digest in code.hashes(config.to_dict()).items()
        if before.get(name, digest) != digest
    ]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    """Output of git in the source checkout, None outside one."""
    how: Any = {"capture_output": True, "text": True, "timeout": 10, "check": True}
    try:
        done = subprocess.run(["git", *arguments], cwd=Path(__file__).parent, **how)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _git_dirty() -> bool:
    """Whether code differs from the commit. An untracked file that is no Python, as a study's YAML,
    changes none: what a run reads of it is in config.yaml.
    """
    status = _git("status", "--porcelain", "-z", "--untracked-files=all") or ""
    entries = [entry for entry in status.split("\0") if entry]
    return any(not entry.startswith("?? ") or entry.endswith(".py") for entry in entries)


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if sys.platform == "linux" and cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
