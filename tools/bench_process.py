"""The process of one variant of tools/bench.py: its spec goes in as JSON, commands and answers line
by line.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Child:
    """One variant's process (tools/bench_child.py)."""

    name: str
    spec: dict[str, Any]
    optional: bool = False  # may be missing from the comparison, with the reason
    tokens: int = 0
    answers: list[dict[str, float]] = field(default_factory=list)
    first: dict[str, Any] = field(default_factory=dict)
    # What it writes to stderr: a pipe that nobody reads until the end would stop it after 64 KiB of
    # warnings.
    errors: Any = field(default_factory=lambda: tempfile.TemporaryFile("w+"))  # noqa: SIM115

    @property
    def dtype(self) -> str:
        return self.spec["config"]["train"]["dtype"]

    def start(self, threads: int) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": python_path()}
        train, data = self.spec["config"]["train"], self.spec["config"]["data"]
        self.tokens = train["micro_batch_size"] * data["seq_len"]
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "tools/bench_child.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            env=environment,
        )
        self.tell(json.dumps(self.spec | {"threads": threads}))

    def tell(self, command: str) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # its answer will say why
            self.process.stdin.write(command + "\n")
            self.process.stdin.flush()

    def ask(self, command: str) -> Any:
        self.tell(command)
        return self.answer()

    def answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.process.communicate()
            self.errors.seek(0)
            raise ValueError(
                f"{self.name}: {last_words(self.errors.read(), self.process.returncode)}"
            )
        return json.loads(line)

    def stop(self) -> None:
        # also in the middle of a step, or while it builds: nobody waits for that any more
        self.process.terminate()
        self.process.communicate()


def last_words(errors: str, code: int) -> str:
    """Why a process ended, from what it wrote: nothing, if it was killed for its memory."""
    return (errors.strip().splitlines() or [f"ended without a word, exit code {code}"])[-1]


def python_path() -> str:
    return os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
