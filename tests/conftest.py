"""Fixtures for every test: seeds, one torch thread, settings put back, a very small model."""

import os
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

# The same examples in every run, and no time limit on one: machines are shared.
settings.register_profile("suite", deadline=None, derandomize=True)
settings.load_profile("suite")

# Read when torch and numpy are imported, here and in the processes that tests start. torch is not
# imported here: the tests of --help and of the config do without it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# tests/gpu says otherwise to the processes that it starts
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("MPLBACKEND", "Agg")
if not os.path.exists("/dev/nvidiactl"):
    # read when kernels are defined: where Triton is, a CPU runs them
    os.environ.setdefault("TRITON_INTERPRET", "1")

# What a killed process has written is not lost. Disks, for which only a power cut would need to
# wait, can take minutes.
os.fsync = lambda descriptor: None

TINY_CONFIG: dict[str, dict[str, Any]] = {
    "run": {"name": "tiny", "dir": "runs", "seed": 1234},
    "model": {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "moe_intermediate_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "q_lora_rank": 16,
        "kv_lora_rank": 8,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 8,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "n_group": 4,
        "topk_group": 2,
        "routed_scaling_factor": 2.5,
        "first_k_dense_replace": 1,
        "max_position_embeddings": 16,
        "initializer_range": 0.1,
    },
    "mtp": {"mode": "sequential", "num_nextn_predict_layers": 1},
    "data": {"train": "data/tiny", "val": "data/tiny", "build": None, "seq_len": 16},
    "optim": {"lr": 3.0e-3},
    "train": {"total_tokens": 4096, "batch_size": 4, "micro_batch_size": 4, "threads": 1},
    "checkpoint": {"every": 4, "keep": 2},
    "eval": {"every": 4, "batches": 2},
    "log": {"every": 1, "tensorboard": False},
}


def tiny(overrides: dict[str, Any] | None = None) -> Any:
    """TINY_CONFIG with dotted overrides as a Config: tiny({"mtp.mode": "none"})."""
    from dsv3_mtp.config import Config

    sections = {name: dict(values) for name, values in TINY_CONFIG.items()}
    for key, value in (overrides or {}).items():
        section, _, name = key.partition(".")
        sections.setdefault(section, {})[name] = value
    return Config.model_validate(sections)


def short_run(
    folder: Path, name: str, data: str | None, base: dict[str, Any], overrides: dict[str, Any]
) -> Any:
    """`tiny` as a float32 run FOLDER/runs/NAME on `data`. base: dotted keys; overrides: keywords of
    a test, with __ for the dot.
    """
    keys = {"run.name": name, "run.dir": str(folder / "runs"), "train.dtype": "float32"}
    keys |= {"data.train": data, "data.val": data}
    dotted = {key.replace("__", "."): value for key, value in overrides.items()}
    return tiny(keys | base | dotted)


@pytest.fixture(scope="session")
def make_tiny_config() -> Callable[..., Any]:
    """The function `tiny`."""
    return tiny


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, by relative path."""
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }


@pytest.fixture
def tiny_config(make_tiny_config: Callable[..., Any]) -> Any:
    """Config of a V3 model with 3 layers (1 dense), 8 experts in 4 groups, top-2, vocab 64, one MTP
    depth.
    """
    return make_tiny_config()


@pytest.fixture(autouse=True)
def reproducible() -> Iterator[None]:
    """Seed every generator before each test; put torch's settings back after it."""
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    torch = sys.modules.get("torch")
    if torch is None:
        yield
        return
    torch.manual_seed(0)
    torch.set_num_threads(1)
    dtype = torch.get_default_dtype()
    yield
    torch.set_default_dtype(dtype)
    torch.set_float32_matmul_precision("highest")


@pytest.fixture
def compiled() -> None:
    """Skips where the C kernels cannot be built."""
    from dsv3_mtp.ops import c_library

    for dtype in c_library.TYPES:
        if reason := c_library.unavailable(dtype):
            pytest.skip(reason)


@pytest.fixture(autouse=True, scope="module")
def no_gpu(request: pytest.FixtureRequest) -> Iterator[None]:
    """Tests without the mark gpu run on the CPU on every machine: they fork ranks, which could not
    use a GPU.
    """
    if any(
        item.path == request.path and item.get_closest_marker("gpu")
        for item in request.session.items
    ):
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")  # of processes that are started afresh
        if "torch" in sys.modules:
            patch.setattr(sys.modules["torch"].cuda, "is_available", lambda: False)
        yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything in tests/gpu needs a GPU. The files that take longest come first: two processes
    then end together.
    """
    longest = ["trainer", "layouts", "answers", "generate", "run", "causal_lm", "draft", "heads"]
    longest += ["pipeline", "posthoc", "checkpoint", "triton_kernels", "evaluate", "parity"]
    place = {f"test_{name}.py": number for number, name in enumerate(longest)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))
    for item in items:
        if Path(__file__).parent / "gpu" in item.path.parents:
            item.add_marker(pytest.mark.gpu)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device, and torch sees none")
