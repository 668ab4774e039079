"""One variant of a comparison in a process of its own: its spec goes in as a JSON line, then
commands, and each is answered by a JSON line.

The parent's side is `Child`: every answer has a time limit, and a child that fails costs the
comparison that child only. The child's side is `serve`: it ends with its parent, also if that is
killed (Linux), or at the end of its input.
"""

import contextlib
import ctypes
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 1800.0  # seconds for one answer: the build of a compiled model takes minutes


class ChildError(ValueError):
    """A child ended, or did not answer in time."""


class Child:
    """A process of `script` (of bench/). limit: seconds for each answer.

    Raises (answer, ask):
        ChildError: with the child's last words.
    """

    def __init__(self, name: str, script: str, spec: dict[str, Any], *, limit: float = LIMIT):
        self.name, self.script, self.spec, self.limit = name, script, spec, limit
        self.process: subprocess.Popen[str] | None = None

    def start(self, threads: int) -> None:
        # stderr: a pipe that nobody reads until the end would stop it after 64 KiB of warnings
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": os.pathsep.join(paths)}
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "bench" / self.script), "serve"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            env=os.environ | environment,
        )
        self.tell(json.dumps(self.spec | {"threads": threads, "parent": os.getpid()}))

    def tell(self, command: str) -> None:
        assert self.process is not None and self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # its answer will say why
            self.process.stdin.write(command + "\n")
            self.process.stdin.flush()

    def ask(self, command: str) -> Any:
        self.tell(command)
        return self.answer()

    def answer(self) -> Any:
        assert self.process is not None and self.process.stdout is not None
        with selectors.DefaultSelector() as ready:
            ready.register(self.process.stdout, selectors.EVENT_READ)
            if not ready.select(self.limit):
                self.stop()
                raise ChildError(f"{self.name}: no answer in {self.limit:.0f} s")
        line = self.process.stdout.readline()
        if not line:
            self.process.communicate()
            raise ChildError(f"{self.name}: {self.last_words()}")
        return json.loads(line)

    def last_words(self) -> str:
        """Why it ended, from what it wrote: nothing, if it was killed for its memory."""
        assert self.process is not None
        self.errors.seek(0)
        said = self.errors.read().strip().splitlines()
        return said[-1] if said else f"ended without a word, exit code {self.process.returncode}"

    def stop(self) -> None:
        """Also in the middle of a step, or while it builds: nobody waits for that any more."""
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.communicate(timeout=10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.communicate()


def serve(build: Callable[[dict[str, Any]], tuple[Any, dict[str, Callable[[str], Any]]]]) -> None:
    """The child's side. build(spec) -> the first answer, and what answers each command, from the
    command's argument. What is printed elsewhere goes to stderr.
    """
    spec = json.loads(sys.stdin.readline())
    end_with(spec["parent"])
    out, sys.stdout = sys.stdout, sys.stderr

    def answer(value: Any) -> None:
        print(json.dumps(value), file=out, flush=True)

    first, commands = build(spec)
    answer(first)
    for line in sys.stdin:
        command, _, argument = line.strip().partition(" ")
        answer(commands[command](argument))


def end_with(parent: int) -> None:
    """This process is killed when the process `parent` ends (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:  # it has ended already
            os._exit(1)
