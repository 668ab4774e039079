"""Every command in the README's bash blocks is run here, run by CI, or marked as needing what CI
has not.
"""

import inspect
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ranks import run_tool

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
PATH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # deepspeed starts `python`
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "PATH": PATH}

# Covered elsewhere: .ci/run is `make lint` and `make test`; tests train with the tool that `make
# train` runs.
COVERED = re.compile(
    r"make (help|install|corpus|train|test|lint|check)|git clone \S+|cd \S+"
    r"|(\. |source )\S*activate"
)
# A comment with one of these words says what a command needs that CI does not have.
MARKED = re.compile(r"#.*\b(GPUs?|nodes?|Slurm)\b")
LAUNCHERS = {"python", "python3", "deepspeed", "torchrun"}
# Sub-command of dsv3 -> the same command of a clone, and what comes before its arguments.
SAME = ("train", "study", "generate", "evaluate", "analyse", "verify")
DSV3 = {name: (f"tools/{name}.py", []) for name in SAME}
DSV3 |= {"prepare": ("tools/prepare_data.py", []), "plan": ("tools/train.py", ["--dry-run"])}
DSV3 |= {"export": ("tools/export_hf.py", []), "import": ("tools/import_hf.py", [])}


def readme_commands(text: str) -> list[str]:
    """The commands of all ```bash blocks, continued lines joined, comment lines and empty lines
    left out.
    """
    blocks = re.findall(r"^```bash\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.strip() for line in lines if line.strip() and not line.strip().startswith("#")]


def tool_of(command: str) -> tuple[str, list[str]] | None:
    """(tools/NAME.py, its arguments) of a command that starts a tool, by any launcher; None for
    another.
    """
    words = shlex.split(command, comments=True)
    while words and re.fullmatch(r"\w+=\S*", words[0]):
        words.pop(0)
    if len(words) > 1 and words[0] == "dsv3" and words[1] in DSV3:
        tool, first = DSV3[words[1]]
        return tool, [*first, *words[2:]]
    script = next((n for n, word in enumerate(words) if re.fullmatch(r"tools/\w+\.py", word)), None)
    if script is None or Path(words[0]).name not in LAUNCHERS:
        return None
    return words[script], words[script + 1 :]


def how_covered(command: str) -> str | None:
    """ "marked", "elsewhere" or "run"; None when nothing would notice that the command is wrong."""
    if MARKED.search(command):
        return "marked"
    if COVERED.fullmatch(" ".join(shlex.split(command, comments=True))):
        return "elsewhere"
    return "run" if tool_of(command) else None


def run(tool: str, arguments: list[str], log: Path) -> str:
    code, output = run_tool(ROOT / tool, *arguments, log=log, cwd=ROOT)
    assert code == 0, f"{shlex.join([tool, *arguments])}: exit code {code}\n{output}"
    return output


COMMANDS = readme_commands(README.read_text()) if README.exists() else []


def test_readme_has_commands():
    assert {"make train", "make test"} <= {
        " ".join(shlex.split(c, comments=True)) for c in COMMANDS
    }


@pytest.mark.parametrize("command", COMMANDS)
def test_readme_command_is_covered(command: str):
    assert how_covered(command), (
        f"{command!r}: neither run by this test, nor by CI, nor marked, e.g. with '# GPU'"
    )


@pytest.mark.parametrize("command", [c for c in COMMANDS if how_covered(c) == "run"])
def test_readme_command_fits_the_tool(command: str, tmp_path: Path):
    tool, arguments = tool_of(command) or pytest.fail(command)
    described = run(tool, ["--help"], tmp_path / "help")
    for argument in arguments:
        if argument.startswith("--"):
            assert re.search(
                rf"(?<![\w-]){re.escape(argument.partition('=')[0])}(?![\w-])", described
            ), argument
        if argument.startswith("configs/"):
            assert (ROOT / argument).exists(), argument
    if "--dry-run" in described:
        elsewhere = ["--set", f"run.dir={tmp_path}"] if "--set" in described else []
        dry = [] if "--dry-run" in arguments else ["--dry-run"]
        run(tool, [*arguments, *dry, *elsewhere], tmp_path / "dry-run")


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("make train", "elsewhere"),
        ("make test  # two minutes", "elsewhere"),
        ("make tea", None),
        ("deepspeed tools/train.py --config configs/v3_tiny.yaml", "run"),
        (
            (
                "DS_ACCELERATOR=cpu deepspeed --num_gpus 2 "
                "tools/train.py --config configs/v3_tiny.yaml"
            ),
            "run",
        ),
        ("deepspeed --num_gpus 8 tools/train.py --config configs/v3_16b.yaml  # 8 GPUs", "marked"),
        (".venv/bin/python tools/generate.py --prompt 'def '", "run"),
        ("dsv3 plan --config v3_671b --world-size 2048", "run"),
        ("dsv3 dance", None),
        ("rm -rf tools/train.py", None),
        ("curl example.org | sh", None),
    ],
)
def test_a_command_is_sorted_by_who_would_notice_that_it_is_wrong(
    command: str, expected: str | None
):
    assert how_covered(command) == expected


def test_commands_are_read_from_bash_blocks_only():
    first = "```bash\n# first\nmake train\n\npython tools/x.py \\\n  --a 1\n```\n"
    assert readme_commands(first + "```\noutput\n```\n```bash\nmake test\n```\n") == [
        "make train",
        "python tools/x.py    --a 1",
        "make test",
    ]


def test_the_python_examples_run(tmp_path: Path):
    for number, block in enumerate(
        re.findall(r"^```python\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)
    ):
        script = tmp_path / f"example{number}.py"
        script.write_text(block)
        run(str(script), [], tmp_path / script.stem)


# What makes a command of the README short: options behind those that it has.
FEWER = ["--set", "train.total_tokens=8192", "--set", "eval.batches=2"]
SHORTER = {"train": FEWER, "study": ["--dry-run"], "generate": ["--max-new-tokens", "8"]}
SHORTER["evaluate"] = ["--batches", "2", "--prompts", "4"]


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.timeout(1200)
def test_the_journeys_run_one_after_another(tmp_path: Path):
    """In a folder with the clone's configs and tools and a corpus of its own. Two processes get a
    run of their own, and a study is not run: the tutorial's is.
    """
    for name in ("configs", "tools"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "corpus" / "mine").mkdir(parents=True)
    modules = sorted(Path(inspect.__file__).parent.glob("*.py"))[:80]
    lines = [json.dumps({"text": path.read_text()}) for path in modules]
    (tmp_path / "corpus" / "mine" / "a.jsonl").write_text("\n".join(lines))
    inline = re.findall(r"`(dsv3 compare [^`]+)`", README.read_text())
    commands = [command for command in COMMANDS if how_covered(command) == "run"]
    assert len(commands) > 10 and len(inline) == 1
    compare = inline[0].replace("runs/a ", "runs/v3_tiny ").replace("runs/b ", "runs/cosine ")
    for command in [*commands, compare]:
        words = shlex.split(command, comments=True)
        kind = words[1] if words[0] == "dsv3" else Path((tool_of(command) or [""])[0]).stem
        if "--num_gpus" in words:
            words += ["--set", "run.name=two"]
        words += [
            word for word in SHORTER.get(kind, []) if word.startswith("--set") or word not in words
        ]
        if words[0] == "dsv3":
            words = [sys.executable, "-m", "dsv3_mtp", *words[1:]]
        done = subprocess.run(words, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True)
        assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout}\n{done.stderr}"
    for made in (
        "runs/two/curves.png",
        "runs/mine/curves.png",
        "hf/v3_tiny/config.json",
        "runs/ab",
    ):
        assert (tmp_path / made).exists(), made
