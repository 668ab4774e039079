"""What all commands share: how they are found, their `--config` and `--set`, errors to exit codes.

Exit codes: 0 done, 1 the work failed, 2 wrong options, config, data or folder, 130 interrupted.
"""

import argparse
import importlib
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# Of what an evaluation reads: a slip of the finger must not keep the machine for days.
MOST_WINDOWS = 2**16
# Command -> its file in this folder, and what `dsv3 --help` says of it.
COMMANDS = {
    "train": ("train", "train a model, or go on with a run"),
    "plan": ("plan", "sizes, memory, cost and layout of a run; runs nothing"),
    "study": ("study", "run a matrix of arms and seeds, and report on it"),
    "compare": ("compare", "finished runs side by side: settings, metrics, curves"),
    "generate": ("generate", "text from a trained model, plain or speculative"),
    "evaluate": ("evaluate", "losses, agreement and acceptance of a run or checkpoint"),
    "analyse": ("analyse", "loss and overlap by kind of token; probes, routers, gradients"),
    "prepare": ("prepare", "text to token shards for training"),
    "export": ("export_hf", "a run's checkpoint in DeepSeek-V3's layout"),
    "import": ("import_hf", "a checkpoint in DeepSeek-V3's layout as a run"),
    "verify": ("verify", "compare a run, checkpoint, export or data with what was written"),
    "configs": ("configs", "list the shipped configs, or print one"),
    "bench": ("bench", "the benchmarks of a clone"),
}


class Failure(Exception):
    """The work failed, and the input is not to blame: exit code 1 and one message."""


def main(arguments: Sequence[str] | None = None) -> int:
    """`dsv3 COMMAND ...`. arguments: without the program's name; None: those of this process."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    if words and words[0] in COMMANDS:
        return run(words[0], words[1:], program=f"dsv3 {words[0]}")
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {summary}" for name, (_, summary) in COMMANDS.items()]
    parser = argparse.ArgumentParser(
        prog="dsv3",
        usage="dsv3 COMMAND [options]",
        description="Multi-token prediction on DeepSeek-V3: `dsv3 COMMAND --help` says more.",
        epilog="\n".join(["commands:", *lines]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
    )
    if not words or words[0] in ("-h", "--help"):
        parser.print_help()
        return 0
    if words == ["--version"]:
        from dsv3_mtp import __version__

        print(__version__)
        return 0
    known = ", ".join(COMMANDS)
    print(f"error: {words[0]}: no such command; there are {known}", file=sys.stderr)
    return 2


def run(name: str, arguments: Sequence[str] | None = None, *, program: str | None = None) -> int:
    """Runs one command and returns its exit code; never a traceback for input that is wrong.

    Args:
        arguments: None: those of this process.
        program: what `--help` calls it; None: the script's name.
    """
    # Read when torch starts its threads: one that spins for a core held by another process slows
    # small machines severalfold.
    os.environ.setdefault("GOMP_SPINCOUNT", "100000")
    command = importlib.import_module(f"dsv3_mtp.cli.{COMMANDS[name][0]}")
    parser = argparse.ArgumentParser(
        prog=program,
        description=command.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_options(parser)
    options = parser.parse_args(arguments)
    if (check := getattr(command, "check", None)) and (wrong := check(options)):
        parser.error(wrong)
    from dsv3_mtp.config import code  # not above: --help loads no pydantic
    from dsv3_mtp.config.launcher import check_numbers

    try:
        check_numbers()
        return command.run(options) or 0
    except BrokenPipeError:  # the reader of stdout has gone (head)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is flushed at the end goes nowhere
        return 0
    except Failure as failure:
        return _fail(str(failure), 1)
    except OSError as error:
        named = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
        return _fail(f"error: {named or error}", 2)
    except ValueError as error:
        return _fail(f"error: {error}", 2)
    except Exception as error:
        if (where := code.place(error)) is None:
            raise
        return _fail(f"error: {where}: {type(error).__name__}: {error}", 2)
    except KeyboardInterrupt as interrupt:
        return _fail(str(interrupt) or getattr(command, "INTERRUPTED", "interrupted"), 130)


def add_config(parser: argparse.ArgumentParser) -> None:
    """The options `--config` (a file, or the name of a shipped one) and `--set`."""
    text = "a file, or the name of a shipped one (`dsv3 configs`)"
    how: Any = {"required": True, "metavar": "YAML", "type": find_config}
    parser.add_argument("--config", **how, help=text)
    add_sets(parser)


def add_sets(parser: argparse.ArgumentParser) -> None:
    how: Any = {"action": "append", "default": [], "dest": "sets", "metavar": "a.b=c"}
    parser.add_argument("--set", **how, help="override a setting; repeatable")


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """The options `--ema` and `--trust-code` of commands that read a run's weights."""
    text = "of a run the average of the weights (train.ema_decay)"
    parser.add_argument("--ema", action="store_true", help=text)
    text = "import the code outside the package that the run's config names"
    parser.add_argument("--trust-code", action="store_true", help=text)


def add_window_options(parser: argparse.ArgumentParser, *, split: str, batches: str) -> None:
    """`--split` and `--batches` of commands that read a text; the rest of their help."""
    add, splits = parser.add_argument, ["train", "val", "shift"]
    add("--split", default="val", choices=splits, help=f"{split} (default: val)")
    number = at_least(1, MOST_WINDOWS)
    add("--batches", type=number, metavar="N", help=f"micro-batches{batches}")


def at_least(bound: int, most: int = 2**31) -> Callable[[str], int]:
    """A `type` for argparse: a whole number >= bound and <= most."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text}: must be a whole number") from None
        if value < bound:
            raise argparse.ArgumentTypeError(f"{text}: must be at least {bound}")
        if value > most:
            raise argparse.ArgumentTypeError(f"{text}: must be at most {most:,}")
        return value

    return read


def shipped_configs() -> Path:
    """The folder configs/: in an installed package inside it, in a clone beside it."""
    package = Path(__file__).parents[1]
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def find_config(name: str) -> str:
    """The file `name`, else the shipped one of that name: v3_tiny, v3_tiny.yaml, studies/heads."""
    if os.path.exists(name):
        return name
    shipped = shipped_configs() / name.removeprefix("configs/")
    places = (str(shipped), str(shipped.with_suffix(".yaml")))
    found = [path for path in places if os.path.isfile(path)]  # no error for too long a name
    return found[0] if found else name


def _fail(message: str, code: int) -> int:
    """Says why and ends with `code`. Of an error on all ranks, rank 0 says it and the launcher ends
    the others while they wait.
    """
    rank = os.environ.get("RANK", "0")
    if rank == "0" or not rank.isdecimal() or code == 130:
        print(message, file=sys.stderr, flush=True)
    else:
        time.sleep(10)
        print(f"rank {rank}: {message}", file=sys.stderr, flush=True)
    torch = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_initialized():
        sys.stdout.flush()
        os._exit(code)  # not sys.exit: gloo's threads may abort a normal exit and change the code
    return code
