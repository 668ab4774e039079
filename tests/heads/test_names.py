"""A kind of head is asked, not compared: its name in `mtp.mode` stands in its own file only."""

import ast
from pathlib import Path

import pytest

from dsv3_mtp.heads import registry

ROOT = Path(__file__).parents[2]
FILES = [*(ROOT / "dsv3_mtp").rglob("*.py"), *(ROOT / "tools").rglob("*.py")]
NAMES = frozenset(registry())


def comparisons(source: str) -> list[int]:
    """Lines that compare something with a kind's name, or choose by it."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        compared: list[ast.AST] = []
        if isinstance(node, ast.Compare):
            compared = [node.left, *node.comparators]
        elif isinstance(node, ast.MatchValue):
            compared = [node.value]
        elif isinstance(node, ast.Dict):
            keys = [key.value for key in node.keys if isinstance(key, ast.Constant)]
            if len(NAMES.intersection(keys)) > 1:  # one alone: "parallel" is a section as well
                lines.append(node.lineno)
        elif isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
            lines += [node.lineno] * (node.slice.value in NAMES - {"parallel"})
        for part in compared:
            values = part.elts if isinstance(part, ast.Tuple | ast.List | ast.Set) else [part]
            if any(isinstance(v, ast.Constant) and v.value in NAMES for v in values):
                lines.append(node.lineno)  # type: ignore[attr-defined]
    return lines


def test_no_file_compares_the_name_of_a_kind_of_head():
    found = {str(path.relative_to(ROOT)): comparisons(path.read_text()) for path in FILES}
    assert found and {name: lines for name, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
    "source",
    [
        'if mtp.mode == "parallel": pass',
        'mtp.mode in ("sequential", "parallel")',
        'KINDS = {"sequential": 1, "parallel": 2}',
        'match mode:\n    case "sequential": pass',
        'KINDS["sequential"]',
    ],
)
def test_a_comparison_is_found(source):
    assert len(comparisons(source)) == 1
