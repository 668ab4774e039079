"""Put ordinary runs side by side: settings that differ, final metrics, curves.

    dsv3 compare runs/a runs/b runs/c --out runs/abc

Runs that differ in run.seed alone are one arm. No p value is printed: what was not planned is for
looking. A question that is asked beforehand is a study (`dsv3 study`). Exit codes: 0 done, 2 a
folder is no finished run.
"""

import argparse
from pathlib import Path


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders")
    text = "for the page and its pictures"
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help=text)
    text = "import the code outside the package that the runs' configs name"
    parser.add_argument("--trust-code", action="store_true", help=text)


def run(options: argparse.Namespace) -> None:
    from dsv3_mtp.study.compare import compare

    text, page = compare(options.runs, options.out, trust_code=options.trust_code)
    print(f"{text}\npage: {page}")
