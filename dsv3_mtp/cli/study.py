"""Run a study: every arm and seed of a matrix as an ordinary run, then statistics and a report.

    dsv3 study --study studies/lambda --dry-run        # the matrix and what it will cost
    dsv3 study --study studies/lambda --jobs 2         # run it; the same command resumes
    dsv3 study --study studies/lambda --only v3_step   # arms or runs whose name starts so
    dsv3 study --study studies/lambda --report-only
    dsv3 study --study studies/lambda --set scale=gpu --set run.name=lambda_gpu

Results: DIR/NAME/report.md, report.html, PNG files, and one run folder per arm and seed. Exit
codes: 0 done, 1 some run failed (the report says which), 2 wrong study file or folder, 130
interrupted.
"""

import argparse
import os
import signal
import sys
from typing import Any

from dsv3_mtp.cli.command import add_config, at_least

INTERRUPTED = "interrupted; the same command goes on"


def add_options(parser: argparse.ArgumentParser) -> None:
    add_config(parser, flag="--study")
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help="only runs whose name starts with one of these"
    )
    parser.add_argument(
        "--jobs",
        type=at_least(1),
        metavar="N",
        help="runs at a time (default: CPU cores; on a GPU and for --dry-run 1)",
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--dry-run", action="store_true", help="print the matrix and its cost; run nothing"
    )
    what.add_argument("--report-only", action="store_true", help="report on what has been run")


def check(options: argparse.Namespace) -> str | None:
    if options.only and (options.dry_run or options.report_only):
        return "--only chooses what is run; it does not go with --dry-run or --report-only"
    return None


def run(options: argparse.Namespace) -> int:
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    from dsv3_mtp.study.matrix import load_study

    loaded = load_study(options.config, options.sets)
    if options.dry_run:
        from dsv3_mtp.study.dryrun import dry_run

        print(dry_run(loaded, jobs=options.jobs))
        return 0
    failed = [] if options.report_only else run_all(loaded, options)
    from dsv3_mtp.study.report import write_report

    try:
        print(f"report: {write_report(loaded)}")
    except ValueError as error:
        if not failed:
            raise
        print(error, file=sys.stderr)
    return 1 if failed else 0


def run_all(loaded: Any, options: argparse.Namespace) -> list[str]:
    """Runs what is not finished; the names of the runs that failed."""
    import torch

    from dsv3_mtp.study.run import run_study

    prefixes = tuple(options.only or [""])
    jobs = options.jobs or (1 if torch.cuda.is_available() else len(os.sched_getaffinity(0)))
    return run_study(loaded, only=lambda run: run.name.startswith(prefixes), jobs=jobs)
