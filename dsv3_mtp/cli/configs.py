"""List the shipped configs, or print one to start your own from.

dsv3 configs                          # names and first lines
dsv3 configs v3_tiny > mine.yaml      # a copy
"""

import argparse
from pathlib import Path

from dsv3_mtp.cli.command import find_config, shipped_configs


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", help="like v3_tiny, or studies/heads")


def run(options: argparse.Namespace) -> None:
    if options.name is not None:
        path = Path(find_config(options.name))
        if not path.is_file():
            raise ValueError(f"{options.name}: no such config; `dsv3 configs` lists them")
        print(path.read_text(encoding="utf-8"), end="")
        return
    folder = shipped_configs()
    files = sorted(folder.glob("*.yaml")) + sorted(folder.glob("studies/*.yaml"))
    names = [str(path.relative_to(folder).with_suffix("")) for path in files]
    width = max(map(len, names), default=0)
    for name, path in zip(names, files, strict=True):
        with path.open(encoding="utf-8") as lines:
            first = next(lines).lstrip("# ").rstrip()
            print(f"{name:{width}}  {first.removeprefix(f'configs/{name}.yaml: ')}")
