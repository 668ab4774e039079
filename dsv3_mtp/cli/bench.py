"""Run a benchmark of the clone that this package is part of: `dsv3 bench NAME [options]`.

dsv3 bench step --preset tiny --against transformers
"""

import argparse
import runpy
import sys
from pathlib import Path

BENCH = Path(__file__).parents[2] / "bench"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", help="a file of bench/, without .py")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="its options")


def run(options: argparse.Namespace) -> int:
    from dsv3_mtp.cli.command import Failure

    names = sorted(path.stem for path in BENCH.glob("*.py") if _is_program(path))
    if not names:
        raise Failure("the benchmarks are not in the wheel: run them from a clone of the project")
    if options.name not in names:
        raise ValueError(f"{options.name or 'bench'}: choose one of {', '.join(names)}")
    script = BENCH / f"{options.name}.py"
    sys.argv = [str(script), *options.arguments]
    sys.path.insert(0, str(BENCH))
    try:
        runpy.run_path(str(script), run_name="__main__")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def _is_program(path: Path) -> bool:
    return '__name__ == "__main__"' in path.read_text()
