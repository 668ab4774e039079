"""The run folder: what it holds besides metrics and checkpoints, and what may change between two
starts of a run.

runs/NAME/  config.yaml  ds_config.json  manifest.json  metrics.jsonl  curves.png  tb/  checkpoints/
"""

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from dsv3_mtp.config import Config
from dsv3_mtp.config.model import OnResume
from dsv3_mtp.config.resume import FREE, differences, rule_of
from dsv3_mtp.data.source import Source
from dsv3_mtp.files.atomic import lock, write_json, write_text
from dsv3_mtp.runs.loading import checkpoints, is_complete, newest_checkpoint
from dsv3_mtp.tasks.examples import TaskSource

PACKAGES = ("torch", "deepspeed", "numpy", "tokenizers", "transformer-engine", "flash-attn")


def run_folder(config: Config) -> Path:
    return Path(config.run.dir) / config.run.name


def lock_folder(folder: Path) -> int:
    """Holds the folder for this process until it ends, or until the returned descriptor is closed.

    Raises:
        ValueError: another process holds it.
    """
    return lock(
        folder / ".lock", f"{folder}: another process works in this folder; choose another run.name"
    )


def find_checkpoint(config: Config) -> tuple[Path | None, list[str]]:
    """Claims the run folder for this process; the checkpoint to resume there, and what to tell the
    user about it.

    Raises:
        ValueError: another process trains in the folder; `checkpoint.resume: never` and there is a
            checkpoint; or all checkpoints are damaged.
    """
    root = run_folder(config) / "checkpoints"
    lock_folder(run_folder(config))
    newest = newest_checkpoint(root)
    if newest is not None and config.checkpoint.resume == "never":
        raise ValueError(
            f"checkpoint.resume: never, but {newest} exists; "
            "choose another run.name or delete the folder"
        )
    damaged = [folder for folder in checkpoints(root) if not is_complete(folder)]
    if newest is None and (root / "latest").exists():
        raise ValueError(
            f"{root}: no checkpoint in it is complete any "
            "more; delete the run folder to start again, "
            "or choose another run.name"
        )
    return newest, [
        f"{folder} is incomplete: not used, and deleted at the next save" for folder in damaged
    ]


def write_run_folder(
    config: Config,
    ds_config: dict[str, Any],
    *,
    world_size: int,
    command: list[str],
    sources: dict[str, Source | TaskSource],
    step: int,
) -> None:
    """config.yaml (resolved), ds_config.json, and one more entry in manifest.json for this start,
    which trains from `step` on. The entry keeps the whole config: the next start may change some of
    it, and config.yaml is that of the last start that trained.
    """
    folder = run_folder(config)
    manifest = folder / "manifest.json"
    try:
        starts = json.loads(manifest.read_text())["starts"] if manifest.exists() else []
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{manifest}: damaged ({error}); delete this file") from None
    start = describe_start(world_size=world_size, command=command, sources=sources)
    starts.append(start | {"step": step, "config": config.to_dict()})
    write_text(folder / "config.yaml", config.to_yaml())
    write_json(folder / "ds_config.json", ds_config)
    write_json(manifest, {"starts": starts})


def describe_start(
    *, world_size: int, command: list[str], sources: dict[str, Source | TaskSource]
) -> dict[str, Any]:
    """Versions, command, git commit, hardware, and the hash of every data source (of a task: of its
    settings).
    """
    cuda = torch.cuda.is_available()
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": command,
        "git": _git("rev-parse", "HEAD"),
        "git_dirty": bool(_git("status", "--porcelain")),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name() if cuda else _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "world_size": world_size,
        "data": {
            role: {
                "path": s.path,
                "manifest_hash": s.manifest_hash,
                "tokens": s.tokens,
                "documents": s.documents,
            }
            for role, s in sources.items()
        },
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
    changes = differences(saved, config.to_dict(), ignoring=FREE)
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


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    """Output of git in the source checkout, None outside one."""
    try:
        done = subprocess.run(
            ["git", *arguments],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if sys.platform == "linux" and cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
