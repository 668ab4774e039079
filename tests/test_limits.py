"""What a reader has to hold in mind at a time is bounded: lines of a function and of a file."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FUNCTION, FILE = 60, 330
# The loop and what one step of it does, in one place: its methods share a dozen of its fields.
LONGER = {"dsv3_mtp/train/trainer.py": 390}
SOURCES = sorted(
    path for folder in ("dsv3_mtp", "bench", "tools") for path in (ROOT / folder).rglob("*.py")
)


def long_functions(source: str) -> list[str]:
    return [
        f"{node.name}: {node.end_lineno - node.lineno + 1} lines"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno - node.lineno >= FUNCTION
    ]


def test_functions_and_files_are_short():
    """What is too long is cut where it does two things."""
    found = {}
    for path in SOURCES:
        name, source = str(path.relative_to(ROOT)), path.read_text()
        if problems := long_functions(source):
            found[name] = problems
        if (lines := len(source.splitlines())) > LONGER.get(name, FILE):
            found.setdefault(name, []).append(f"{lines} lines")
    assert SOURCES and found == {}


def test_a_long_function_is_reported():
    body = "\n".join(["    pass"] * FUNCTION)
    assert long_functions(f"def short():\n    pass\n\n\ndef long():\n{body}") == ["long: 61 lines"]
