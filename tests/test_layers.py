"""Imports go down only, and each heavy dependency has one door. The imports are parsed, not run."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "dsv3_mtp"

LAYERS = {
    "config": 0,
    **dict.fromkeys(
        ["kernels", "fused", "tuning", "schedules", "losses", "precision", "data", "metrics", "progress", "plots"], 1
    ),
    **dict.fromkeys(["triton_kernels", "tensorfile", "fragments", "atomic"], 1),
    "model": 2,
    **dict.fromkeys(["parallel", "optim", "checkpoint", "hf", "generate", "decode", "loading"], 3),
    **dict.fromkeys(["trainer", "evaluate", "grade", "study", "runs", "dryrun", "plan"], 4),
}
TOP = 5  # the package's __init__.py (the public API) and tools/

# Third-party module -> the parts of the package that may import it.
DOORS = {"deepspeed": {"parallel"}, "transformer_engine": {"precision"}, "triton": {"precision", "triton_kernels"}}
# Part of the package -> all the third-party modules that it may import.
ALLOWED = {"config": {"pydantic", "pydantic_core", "yaml"}, "model": {"torch"}}


def imported_modules(source: str, package: list[str]) -> list[tuple[str, int]]:
    """Absolute dotted name and line of every import in `source`, nested ones too; `package` is its folder."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join(base + ([node.module] if node.module else []))
            if module == "dsv3_mtp":  # `from dsv3_mtp import metrics` names modules, or the public API
                found += [(f"dsv3_mtp.{alias.name}", node.lineno) for alias in node.names]
            else:
                found.append((module, node.lineno))
    return found


def part_of(path: Path) -> str:
    """The entry of LAYERS that a file of the package belongs to: `data` for data/windows.py."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def violations(part: str, source: str, package: list[str]) -> list[str]:
    """What is wrong with the imports of one file that belongs to `part`."""
    problems = []
    for name, line in imported_modules(source, package):
        root, _, rest = name.partition(".")
        if root == "dsv3_mtp":
            target = rest.split(".")[0]
            if LAYERS.get(target, TOP) > LAYERS.get(part, TOP):
                problems.append(f"line {line}: {part} (layer {LAYERS[part]}) imports {name} from above")
        elif root not in sys.stdlib_module_names:
            if part not in DOORS.get(root, {part}):
                problems.append(f"line {line}: {part} imports {root}; only {sorted(DOORS[root])} may")
            if root not in ALLOWED.get(part, {root}):
                problems.append(f"line {line}: {part} imports {root}; allowed are {sorted(ALLOWED[part])}")
    return problems


def package_files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def dotted(path: Path) -> list[str]:
    return list(path.relative_to(ROOT).parent.parts)


@pytest.mark.parametrize("path", package_files(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_file_imports_only_from_its_layer_and_below(path: Path):
    part = part_of(path)
    assert part in LAYERS or part == "__init__", f"{part} has no layer: add it to LAYERS in {__file__}"
    assert violations(part, path.read_text(), dotted(path)) == []


@pytest.mark.parametrize("path", sorted((ROOT / "tools").glob("*.py")), ids=lambda path: path.name)
def test_tool_leaves_deepspeed_and_transformer_engine_to_the_package(path: Path):
    roots = {name.partition(".")[0] for name, _ in imported_modules(path.read_text(), ["tools"])}
    assert roots.isdisjoint(DOORS)


@pytest.fixture(scope="module")
def edges() -> dict[str, set[str]]:
    """Part of the package -> the parts that it imports."""
    found: dict[str, set[str]] = {}
    for path in package_files():
        names = [name.split(".") for name, _ in imported_modules(path.read_text(), dotted(path))]
        found.setdefault(part_of(path), set()).update(n[1] for n in names if n[0] == "dsv3_mtp" and len(n) > 1)
    return found


@pytest.mark.parametrize("part", ["model", "generate", "decode", "loading", "hf"])
def test_deepspeed_is_out_of_reach_of(part: str, edges: dict[str, set[str]]):
    reached, frontier = set(), [part]
    while frontier:
        here = frontier.pop()
        if here not in reached:
            reached.add(here)
            frontier += edges.get(here, set())
    assert "parallel" not in reached


ABSENT = {
    "dsv3_mtp.config": ["torch", "numpy", "deepspeed", "matplotlib"],
    "dsv3_mtp.metrics": ["torch", "deepspeed", "matplotlib"],
    "dsv3_mtp.model": ["deepspeed", "transformer_engine", "transformers"],
    "dsv3_mtp.hf": ["deepspeed", "transformer_engine", "transformers", "safetensors"],
    "dsv3_mtp.evaluate": ["deepspeed", "transformers", "lm_eval"],
    "dsv3_mtp.generate": ["deepspeed", "transformer_engine", "transformers"],
}


@pytest.mark.parametrize("first", ["json", "torch"])
def test_importing_a_module_does_not_load(first: str):
    """Each in a process of its own, forked from one that has imported torch where that is allowed."""
    absent = {module: names for module, names in ABSENT.items() if ("torch" in names) == (first == "json")}
    code = f"""import {first}, os, sys
for module, names in {absent}.items():
    if not os.fork():
        __import__(module)
        os.write(1, f"{{module}} {{[name for name in names if name in sys.modules]}}\\n".encode())
        os._exit(0)
    os.wait()"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert run.stdout.splitlines() == [f"{module} []" for module in absent], run.stderr


@pytest.mark.parametrize(
    ("part", "source", "message"),
    [
        ("losses", "from dsv3_mtp.model.mtp import MTPLayer", "from above"),
        ("losses", "def late():\n    from ..trainer import train", "from above"),
        ("metrics", "from dsv3_mtp import model", "from above"),
        ("metrics", "from dsv3_mtp import train", "from above"),
        ("trainer", "import deepspeed", "only ['parallel'] may"),
        ("config", "import torch.nn", "allowed are"),
        ("model", "from einops import rearrange", "allowed are"),
        ("model", "import transformer_engine.pytorch as te", "only ['precision'] may"),
    ],
)
def test_a_bad_import_is_reported(part: str, source: str, message: str):
    assert any(message in problem for problem in violations(part, source, ["dsv3_mtp", part]))


def test_a_good_import_is_not_reported():
    source = "import os\nimport torch\nfrom dsv3_mtp import losses\nfrom .layers import RMSNorm"
    assert violations("model", source, ["dsv3_mtp", "model"]) == []
