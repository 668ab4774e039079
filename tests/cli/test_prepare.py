"""`dsv3 prepare` from the outside: a process of its own once, forks of this one for all else."""

import contextlib
import itertools
import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dsv3_mtp.cli import prepare
from dsv3_mtp.data import tokenise
from tests.bad_inputs.ask import Answer, ask
from tests.conftest import contents

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = 1200


def process(*arguments: str | Path, flags: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
    command = [sys.executable, *flags, str(ROOT / "tools/prepare_data.py"), *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)


def run(folder: Path, *arguments: str | Path) -> Answer:
    """The command in a fork of this process; what it says goes beside `folder`/here."""
    (folder / "here").mkdir(exist_ok=True)
    return ask(shlex.join(["prepare", *map(str, arguments)]), folder / "here")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("in") / "a.jsonl"
    texts = [f"record {i} " + "many words " * (i % 20) for i in range(DOCUMENTS)]
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return path


def arguments(corpus: Path, out: Path) -> list[str | Path]:
    sizes = ["--vocab-size", "261", "--shard-tokens", "2000", "--fim-rate", "0.1"]
    return ["--input", corpus, "--out", out, *sizes]


@pytest.fixture(scope="module")
def whole(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "out"
    done = process(*arguments(corpus, out))
    assert done.returncode == 0, done.stderr
    assert "train: " in done.stdout and "val: " in done.stdout and "documents" in done.stdout
    return out


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGKILL, -9), (signal.SIGINT, 130)])
def test_killed_in_the_middle_the_same_command_goes_on_byte_identically(
    corpus, whole, tmp_path, monkeypatch, sent, code
):
    """At its sixth batch, which it is told of where it would draw its progress."""

    @contextlib.contextmanager
    def struck():
        batches = itertools.count(1)
        yield lambda *_: os.kill(os.getpid(), sent) if next(batches) == 6 else None

    out, progress = tmp_path / "out", tmp_path / "out.partial/progress.json"
    with monkeypatch.context() as patch:
        patch.setattr(tokenise, "BATCH_DOCUMENTS", 100)
        patch.setattr(prepare, "progress_display", struck)
        killed = run(tmp_path, *arguments(corpus, out))
    assert killed.code == code
    assert "Traceback" not in killed.err
    assert ("the same command goes on" in killed.err) == (sent == signal.SIGINT)
    assert not out.exists()
    assert 0 < json.loads(progress.read_text())["documents"] < DOCUMENTS
    assert run(tmp_path, *arguments(corpus, out)).code == 0
    assert contents(out) == contents(whole)


def test_help_loads_nothing_heavy():
    shown = process("--help", flags=("-X", "importtime"))
    assert shown.returncode == 0 and "--fim-rate" in shown.stdout
    assert not any(
        name in shown.stderr for name in ("numpy", "tokenizers", "rich", "torch", "pydantic")
    )


def test_verify_tells_right_from_damaged(whole: Path, tmp_path: Path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for name, content in contents(whole).items():
        (copy / name).write_bytes(content)
    assert run(tmp_path, "--verify", copy).code == 0
    (copy / "train-00000.bin").write_bytes(b"x")
    assert "does not go with --fim-rate" in run(tmp_path, "--verify", copy, "--fim-rate", "0").err
    damaged = run(tmp_path, "--verify", copy)
    assert damaged.code == 2 and "train-00000.bin" in damaged.err


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (b'{"text": "x"}\n{oops\n', ["--vocab-size", "260"], "a.jsonl, line 2: not valid JSON"),
        (b'{"text": "x"}\n', [], "--tokenizer or --vocab-size"),
        (b'{"text": "x"}\n', ["--tokenizer", "none.json"], "none.json: no such file"),
        (b"", ["--vocab-size", "260"], "a.jsonl: no text for train in it"),
    ],
)
def test_bad_input_is_a_message_and_exit_code_2(
    tmp_path: Path, content: bytes, options: list[str], message: str
):
    (tmp_path / "a.jsonl").write_bytes(content)
    failed = run(tmp_path, "--input", tmp_path / "a.jsonl", "--out", tmp_path / "out", *options)
    assert failed.code == 2
    assert (
        failed.err.startswith("error: ") and message in failed.err and "Traceback" not in failed.err
    )
    assert not (tmp_path / "out").exists()


def test_corpus_and_input_do_not_go_together(tmp_path: Path):
    both = ("--corpus", "pystdlib", "--input", "x", "--vocab-size", "300")
    failed = run(tmp_path, *both, "--out", tmp_path / "out")
    assert failed.code == 2 and "either a corpus or inputs" in failed.err
