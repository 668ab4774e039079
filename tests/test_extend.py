"""docs/extend.md does what it says: every block of it is written or run, in order, in one folder.

A block of python or yaml whose first line is a comment with a file name is written under that name;
one without stands word for word in a file of examples/. A
line of a shell block is run in a process of its own and has to end with exit code 0.
"""

import re
import shlex
import shutil
from pathlib import Path

import pytest

from tests.ranks import run_tool
from tests.test_readme import tool_of

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "extend.md").read_text()
FILE = re.compile(r"# (\S+\.(?:py|yaml))\n")

pytestmark = pytest.mark.dist


def chapters() -> dict[str, list[tuple[str, str]]]:
    """Heading -> the (language, text) of its blocks."""
    found = {}
    for part in PAGE.split("\n## ")[1:]:
        heading, _, body = part.partition("\n")
        found[heading] = re.findall(r"^```(\w+)\n(.*?)^```$", body, flags=re.M | re.S)
    return found


CHAPTERS = chapters()


def write_files(folder: Path) -> None:
    """All files of the page, and the configs that its commands name."""
    for blocks in CHAPTERS.values():
        for _, text in blocks:
            if name := FILE.match(text):
                (folder / name[1]).write_text(text)
    shutil.copytree(ROOT / "configs", folder / "configs")
    if (ROOT / "examples").is_dir():
        shutil.copytree(ROOT / "examples", folder / "examples")


@pytest.mark.parametrize("heading", CHAPTERS)
def test_a_chapter_does_what_it_says(tmp_path, heading):
    write_files(tmp_path)
    for language, text in CHAPTERS[heading]:
        if language != "shell":
            shown = [path for path in (ROOT / "examples").glob("*.py") if text in path.read_text()]
            assert FILE.match(text) or shown, f"{heading}: a block is no file and in no example"
            continue
        for number, command in enumerate(text.strip().splitlines()):
            if (found := tool_of(command)) is not None:
                path, arguments = ROOT / found[0], found[1]
            else:
                program, script, *arguments = shlex.split(command)
                assert program == "python", command
                path = tmp_path / script
            log = tmp_path / f"log{number}"
            code, output = run_tool(path, *arguments, log=log, cwd=tmp_path)
            assert code == 0, f"{command}\n{output}"


def test_every_kind_of_extension_has_its_chapter():
    kinds = {"head", "objective", "schedule", "task", "source", "study arm"}
    assert {kind for kind in kinds if any(kind in heading for heading in CHAPTERS)} == kinds
