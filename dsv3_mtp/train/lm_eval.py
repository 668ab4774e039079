"""Tasks of EleutherAI's lm-evaluation-harness on a finished model."""

import contextlib
import importlib.util
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from dsv3_mtp.files.run_folder import run_config
from dsv3_mtp.hf import export_hf


def lm_eval(
    tasks: Sequence[str],
    *,
    run: str | None,
    hf: str | None,
    ema: bool = False,
    trust_code: bool = False,
    include: str | None = None,
    limit: int | None = None,
    batch_size: int = 1,
) -> dict[str, float]:
    """Tasks of EleutherAI's lm-evaluation-harness through its Hugging Face adapter; a run is
    exported first.

    Args:
        include: folder with more task YAMLs. limit: documents per task, None: all.
    Returns:
        `TASK/METRIC` -> value.

    Raises:
        ValueError: the package is missing, or a task is unknown.
    """
    if missing := [
        name for name in ("lm_eval", "transformers") if importlib.util.find_spec(name) is None
    ]:
        raise ValueError(
            f"--lm-eval needs {' and '.join(missing)}: pip install 'dsv3_mtp[eval,hf]'"
        )
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=include, include_defaults=False) if include else None
    if manager is None or not all(manager.match_tasks([task]) for task in tasks):
        manager = TaskManager(include_path=include)  # its thousands of tasks take a while to index
    if unknown := [task for task in tasks if not manager.match_tasks([task])]:
        raise ValueError(f"--lm-eval: lm-evaluation-harness does not know {', '.join(unknown)}")
    with _exported(run, hf, ema, trust_code) as folder:
        if not (folder / "tokenizer.json").is_file():
            raise ValueError(f"{run or hf}: has no tokenizer.json, and tasks are text")
        results = simple_evaluate(
            model="hf",
            model_args={"pretrained": str(folder), "dtype": "auto"},
            tasks=list(tasks),
            task_manager=manager,
            device="cuda" if torch.cuda.is_available() else "cpu",
            batch_size=batch_size,
            limit=limit,
            log_samples=False,
            bootstrap_iters=0,
        )
    values = {}
    for task, metrics in results["results"].items():
        for name, value in metrics.items():
            if isinstance(value, float) and "_stderr" not in name:
                values[f"{task}/{name.removesuffix(',none')}"] = value
    return values


@contextlib.contextmanager
def _exported(run: str | None, hf: str | None, ema: bool, trust_code: bool) -> Iterator[Path]:
    """The folder of weights, for a run a temporary export in the run's own dtype."""
    if hf is not None:
        yield Path(hf)
        return
    with tempfile.TemporaryDirectory() as temporary:
        config = run_config(Path(run or ""), trust_code=trust_code)
        wide = config.train.dtype == "float32"
        export_hf(
            run or "",
            Path(temporary) / "hf",
            dtype="fp32" if wide else "bf16",
            trunk_only=True,
            ema=ema,
            trust_code=trust_code,
        )
        yield Path(temporary) / "hf"
