"""Imports go down only, and each heavy dependency has one door. The imports are parsed, not run."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "dsv3_mtp"

# Part of the package -> its floor. A part is a folder, or a module that stands on another floor
# than its folder.
LAYERS = {
    "config": 0,
    "files": 1,
    "report": 2,
    "ops": 2,
    "data": 2,
    "tasks": 2,
    "precision": 3,
    "objectives": 3,
    "model": 4,
    "plan.parts": 5,
    "decode": 5,
    "parallel": 5,
    "heads": 6,
    "hf": 7,
    "runs": 8,
    "plan": 9,
    "train": 9,
    "analysis": 10,
    "study": 11,
    "api": 12,
    "cli": 12,
}
TOP = 12  # the package's __init__.py (the public API) and tools/

# Third-party module -> the parts of the package that may import it.
DOORS = {
    "deepspeed": {"parallel"},
    "transformer_engine": {"ops.te_library", "precision"},
    "triton": {
        "precision",
        *(f"ops.triton_{name}" for name in ("jit", "kernels", "norm", "router")),
    },
}
# Part of the package -> all the third-party modules that it may import.
ALLOWED = {"config": {"pydantic", "pydantic_core", "yaml"}, "model": {"torch"}}


def imported_modules(source: str, package: list[str]) -> list[tuple[str, int]]:
    """Absolute dotted name and line of every import in `source`, nested ones too; `package` is its
    folder.
    """
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join(base + ([node.module] if node.module else []))
            # `from dsv3_mtp import metrics` names modules, or the public API
            if module == "dsv3_mtp":
                found += [(f"dsv3_mtp.{alias.name}", node.lineno) for alias in node.names]
            else:
                found.append((module, node.lineno))
    return found


def part_of(module: str) -> str:
    """The entry of LAYERS that a module belongs to: `data` for data.windows, `files.run_folder` for
    itself.
    """
    parts = module.split(".")
    names = [".".join(parts[:length]) for length in range(len(parts), 0, -1)]
    return next((name for name in names if name in LAYERS), parts[0])


def name_of(path: Path) -> str:
    """The dotted name of a file of the package, below the package."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def violations(module: str, source: str, package: list[str]) -> list[str]:
    """What is wrong with the imports of one file, `module` below the package."""
    part, folder, problems = part_of(module), module.split(".")[0], []
    for name, line in imported_modules(source, package):
        root, _, rest = name.partition(".")
        if root == "dsv3_mtp":
            if LAYERS.get(part_of(rest), TOP) > LAYERS.get(part, TOP):
                problems.append(
                    f"line {line}: {part} (layer {LAYERS[part]}) imports {name} from above"
                )
        elif root not in sys.stdlib_module_names:
            if root in DOORS and not {module, folder} & DOORS[root]:
                problems.append(
                    f"line {line}: {part} imports {root}; only {sorted(DOORS[root])} may"
                )
            if root not in ALLOWED.get(folder, {root}):
                problems.append(
                    f"line {line}: {part} imports {root}; allowed are {sorted(ALLOWED[folder])}"
                )
    return problems


def package_files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def dotted(path: Path) -> list[str]:
    return list(path.relative_to(ROOT).parent.parts)


def test_files_import_only_from_their_layer_and_below():
    found = {}
    for path in package_files():
        part = part_of(name_of(path))
        if part not in LAYERS and part not in ("__init__", "__main__"):
            found[name_of(path)] = [f"{part} has no layer: add it to LAYERS in {__file__}"]
        elif problems := violations(name_of(path), path.read_text(), dotted(path)):
            found[name_of(path)] = problems
    assert found == {}


@pytest.mark.parametrize("path", sorted((ROOT / "tools").glob("*.py")), ids=lambda path: path.name)
def test_tool_leaves_deepspeed_and_transformer_engine_to_the_package(path: Path):
    roots = {name.partition(".")[0] for name, _ in imported_modules(path.read_text(), ["tools"])}
    assert roots.isdisjoint(DOORS)


@pytest.fixture(scope="module")
def edges() -> dict[str, set[str]]:
    """Module of the package -> the modules that it imports."""
    modules = {name_of(path) for path in package_files()}
    found: dict[str, set[str]] = {}
    for path in package_files():
        names = [name for name, _ in imported_modules(path.read_text(), dotted(path))]
        found[name_of(path)] = {
            rest if rest in modules else f"{rest}.__init__"
            for root, _, rest in (name.partition(".") for name in names)
            if root == "dsv3_mtp"
        }
    return found


@pytest.mark.parametrize("folder", ["model", "heads", "decode", "runs", "hf"])
def test_deepspeed_is_out_of_reach_of(folder: str, edges: dict[str, set[str]]):
    reached: set[str] = set()
    frontier = [module for module in edges if module.startswith(f"{folder}.")]
    while frontier:
        here = frontier.pop()
        if here not in reached:
            reached.add(here)
            frontier += edges.get(here, set())
    assert not any(module.startswith("parallel") for module in reached)


ABSENT = {
    "dsv3_mtp.config": ["torch", "numpy", "deepspeed", "matplotlib"],
    "dsv3_mtp.report.metrics": ["torch", "deepspeed", "matplotlib"],
    "dsv3_mtp.model": ["deepspeed", "transformer_engine", "transformers"],
    "dsv3_mtp.hf": ["deepspeed", "transformer_engine", "transformers", "safetensors"],
    "dsv3_mtp.train.validation": ["deepspeed", "transformers", "lm_eval"],
    "dsv3_mtp.decode.generate": ["deepspeed", "transformer_engine", "transformers"],
}


@pytest.mark.parametrize("first", ["json", "torch"])
def test_importing_a_module_does_not_load(first: str):
    """Each in a process of its own, forked from one that has imported torch where that is
    allowed.
    """
    absent = {
        module: names for module, names in ABSENT.items() if ("torch" in names) == (first == "json")
    }
    code = f"""import {first}, os, sys
for module, names in {absent}.items():
    if not os.fork():
        __import__(module)
        os.write(1, f"{{module}} {{[name for name in names if name in sys.modules]}}\\n".encode())
        os._exit(0)
    os.wait()"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert run.stdout.splitlines() == [f"{module} []" for module in absent], run.stderr


@pytest.mark.parametrize(
    ("module", "source", "message"),
    [
        ("ops.cross_entropy", "from dsv3_mtp.heads.base import Head", "from above"),
        ("ops.cross_entropy", "def late():\n    from ..train.trainer import Trainer", "from above"),
        ("report.metrics", "from dsv3_mtp import model", "from above"),
        ("report.metrics", "from dsv3_mtp import train", "from above"),
        ("train.trainer", "import deepspeed", "only ['parallel'] may"),
        ("config.run", "import torch.nn", "allowed are"),
        ("model.block", "from einops import rearrange", "allowed are"),
        (
            "model.block",
            "import transformer_engine.pytorch as te",
            "only ['ops.te_library', 'precision'] may",
        ),
    ],
)
def test_a_bad_import_is_reported(module: str, source: str, message: str):
    package = ["dsv3_mtp", module.split(".")[0]]
    assert any(message in problem for problem in violations(module, source, package))


def test_a_good_import_is_not_reported():
    source = "import os\nimport torch\nfrom dsv3_mtp.ops import tuning\nfrom .layers import RMSNorm"
    assert violations("model.block", source, ["dsv3_mtp", "model"]) == []
