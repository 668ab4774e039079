"""Whether the files of a run, a checkpoint, an export or prepared data are what was written."""

from collections.abc import Callable
from pathlib import Path

from dsv3_mtp.config import code, load_config
from dsv3_mtp.config.tree import read_tree
from dsv3_mtp.data.shards import INDEX as PREPARED
from dsv3_mtp.data.shards import verify_folder
from dsv3_mtp.files.fragments import Fragments
from dsv3_mtp.files.run_folder import COMPLETE, IMPORTED, checkpoints, differences, is_complete
from dsv3_mtp.hf.files import INDEX as SHARDED
from dsv3_mtp.hf.load import open_checkpoint
from dsv3_mtp.report.metrics import read_metrics
from dsv3_mtp.runs.folder import MANIFEST, read_starts


def verify(folder: str | Path) -> list[str]:
    """Reads every file of a folder that this project made; returns what is wrong with it.

    folder: a run, one of its checkpoints, a folder in DeepSeek-V3's layout, or prepared data.

    Raises:
        ValueError: it is none of these.
    """
    folder = Path(folder)
    if (folder / "config.yaml").is_file():
        return _run(folder)
    if (folder / COMPLETE).is_file():
        return _checkpoint(folder)
    if (folder / "config.json").is_file() or (folder / SHARDED).is_file():
        return _problems(lambda: _export(folder))
    if (folder / PREPARED).is_file():
        return _problems(lambda: verify_folder(folder))
    raise ValueError(
        f"{folder}: no run (config.yaml), checkpoint ({COMPLETE}), export (config.json) "
        f"or prepared data ({PREPARED}) there"
    )


def _run(folder: Path) -> list[str]:
    problems = _problems(lambda: _config(folder / "config.yaml"))
    if (folder / "metrics.jsonl").is_file():
        problems += _problems(lambda: read_metrics(folder / "metrics.jsonl"))
    if (folder / MANIFEST).is_file():
        problems += _problems(lambda: read_starts(folder))
    if (folder / IMPORTED).is_dir():
        problems += _problems(lambda: _export(folder / IMPORTED))
    for checkpoint in checkpoints(folder / "checkpoints"):
        problems += _checkpoint(checkpoint)
    return problems


def _config(path: Path) -> None:
    """Code that the folder names is not imported: such a config is only read."""
    tree, _ = read_tree(path)
    if not code.named(tree):
        load_config(path, trust_code=False)


def _checkpoint(folder: Path) -> list[str]:
    if not is_complete(folder):
        return [f"{folder}: incomplete: its files are not all there, or not as long as written"]
    if found := differences(folder):
        return [f"{folder}: {text}" for text in found]
    return _problems(lambda: _read_all(Fragments(folder)))


def _read_all(stored: Fragments) -> None:
    for name, about in stored.index.items():
        for state in (None, *about["states"]):
            stored.read(name, state=state)


def _export(folder: Path) -> None:
    checkpoint, *_ = open_checkpoint(folder)
    if found := checkpoint.differences():
        raise ValueError("\n".join(f"{folder}: {text}" for text in found))


def _problems(check: Callable[[], object]) -> list[str]:
    try:
        check()
    except (ValueError, OSError) as error:
        return [str(error)]
    return []
