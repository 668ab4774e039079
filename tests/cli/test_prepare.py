import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import contents

ROOT = Path(__file__).resolve().parents[2]


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, str(ROOT / "tools/prepare_data.py"), *map(str, arguments)]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments), capture_output=True, text=True, env=environment(), timeout=120
    )


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("in") / "a.jsonl"
    lines = [json.dumps({"text": f"record {i} " + "many words " * (i % 20)}) for i in range(12_000)]
    path.write_text("\n".join(lines))
    return path


def arguments(corpus: Path, out: Path) -> list[str | Path]:
    return [
        "--input",
        corpus,
        "--out",
        out,
        "--vocab-size",
        "261",
        "--shard-tokens",
        "20000",
        "--fim-rate",
        "0.1",
    ]


@pytest.fixture(scope="module")
def whole(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "out"
    done = run(*arguments(corpus, out))
    assert done.returncode == 0, done.stderr
    assert "train: " in done.stdout and "val: " in done.stdout and "documents" in done.stdout
    return out


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGKILL, -9), (signal.SIGINT, 130)])
def test_killed_in_the_middle_the_same_command_goes_on_byte_identically(
    corpus, whole, tmp_path, sent, code
):
    out, progress = tmp_path / "out", tmp_path / "out.partial/progress.json"
    # A shell without job control starts background jobs with SIGINT ignored, and they hand that on.
    heed = (
        "import os, signal, sys; signal.signal(signal.SIGINT, "
        "signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])"
    )
    # on a busy machine it may finish before this test is given a core to notice that it began
    for _ in range(5):
        words = [sys.executable, "-c", heed, *command(*arguments(corpus, out))]
        process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env=environment())
        while process.poll() is None and not (
            progress.exists() and json.loads(progress.read_text())["record"]
        ):
            time.sleep(0.002)
        process.send_signal(sent)
        message = process.communicate(timeout=60)[1]
        if process.returncode != 0:
            break
        shutil.rmtree(out)
    assert process.returncode == code
    assert "Traceback" not in message and ("the same command goes on" in message) == (
        sent == signal.SIGINT
    )
    assert not out.exists()
    done = json.loads(progress.read_text())["documents"]
    assert 0 < done < 12_000
    assert run(*arguments(corpus, out)).returncode == 0
    assert contents(out) == contents(whole)


def test_help_loads_nothing_heavy():
    shown = subprocess.run(
        [sys.executable, "-X", "importtime", *command("--help")[1:]],
        capture_output=True,
        text=True,
        env=environment(),
    )
    assert shown.returncode == 0 and "--fim-rate" in shown.stdout
    assert not any(
        name in shown.stderr for name in ("numpy", "tokenizers", "rich", "torch", "pydantic")
    )


def test_verify_tells_right_from_damaged(whole: Path, tmp_path: Path):
    for name, content in contents(whole).items():
        (tmp_path / name).write_bytes(content)
    assert run("--verify", tmp_path).returncode == 0
    (tmp_path / "train-00000.bin").write_bytes(b"x")
    assert "does not go with --fim-rate" in run("--verify", tmp_path, "--fim-rate", "0").stderr
    damaged = run("--verify", tmp_path)
    assert damaged.returncode == 2 and "train-00000.bin" in damaged.stderr


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
    failed = run("--input", tmp_path / "a.jsonl", "--out", tmp_path / "out", *options)
    assert failed.returncode == 2
    assert (
        failed.stderr.startswith("error: ")
        and message in failed.stderr
        and "Traceback" not in failed.stderr
    )
    assert not (tmp_path / "out").exists()


def test_corpus_and_input_do_not_go_together(tmp_path: Path):
    failed = run(
        "--corpus", "pystdlib", "--input", "x", "--out", tmp_path / "out", "--vocab-size", "300"
    )
    assert failed.returncode == 2 and "either a corpus or inputs" in failed.stderr
