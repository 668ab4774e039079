"""The Dockerfile is parsed: it copies what is there, and installs what pyproject.toml names. CI
builds it.
"""

import re
import shlex
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "Dockerfile").read_text()
KNOWN = {"FROM", "ARG", "ENV", "RUN", "WORKDIR", "COPY"}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def instructions(text: str) -> list[tuple[str, str]]:
    """(instruction, its words), continued lines joined."""
    lines = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    return [
        (line.split()[0], line.partition(" ")[2].strip())
        for line in lines.replace("\\\n", " ").splitlines()
        if line.strip()
    ]


def arguments(text: str) -> dict[str, str]:
    return dict(words.split("=", 1) for name, words in instructions(text) if name == "ARG")


def test_it_consists_of_known_instructions_and_starts_from_an_image():
    found = instructions(TEXT)
    assert {name for name, _ in found} == KNOWN
    assert found[0][0] == "ARG" and found[1] == ("FROM", "${BASE}")
    for name, words in found:
        if name == "RUN":
            assert shlex.split(words)  # closed quotes
            assert set(re.findall(r"\$(\w+)", words)) <= {*arguments(TEXT), "VIRTUAL_ENV"}


def test_it_copies_what_is_there_and_what_the_wheel_needs():
    sources = [w.split()[:-1] for name, w in instructions(TEXT) if name == "COPY"]
    copied = {source for words in sources for source in words}
    assert [source for source in copied if not (ROOT / source).exists()] == []
    built = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]
    needed = [*built["packages"], *built["force-include"], PROJECT["project"]["readme"]]
    assert {*needed, *PROJECT["project"]["license-files"], "pyproject.toml"} <= copied


def test_its_extras_and_its_torch_are_those_of_the_project():
    given, extras = arguments(TEXT), PROJECT["project"]["optional-dependencies"]
    assert set(given["EXTRAS"].split(",")) <= set(extras)
    torch = next(
        r for r in map(Requirement, PROJECT["project"]["dependencies"]) if r.name == "torch"
    )
    wanted = re.fullmatch(r"torch==(\d+\.\d+)\.\*", given["TORCH"])
    assert wanted is not None and Version(wanted[1] + ".0") in torch.specifier
    # without build isolation its build backend is installed by hand
    (backend,) = map(Requirement, PROJECT["build-system"]["requires"])
    installs = [words for name, words in instructions(TEXT) if name == "RUN" and "pip" in words]
    assert backend.name in installs[0] and "--no-build-isolation" in installs[1]


def test_ci_builds_it_with_arguments_that_it_has():
    workflow = (ROOT / ".github/workflows/ci.yml").read_text()
    (build,) = re.findall(r"docker build (.*)", workflow)
    given = dict(re.findall(r"--build-arg (\w+)=(\S+)", build))
    assert set(given) <= set(arguments(TEXT))
    assert set(given["EXTRAS"].split(",")) <= set(PROJECT["project"]["optional-dependencies"])
