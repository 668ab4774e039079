"""Run a study: every arm and seed of a matrix as an ordinary run, then statistics and a report.

    python tools/study.py --study configs/studies/lambda.yaml --dry-run        # the matrix and what it will cost
    python tools/study.py --study configs/studies/lambda.yaml --jobs 2         # run it; the same command resumes
    python tools/study.py --study configs/studies/lambda.yaml --only v3_step   # arms or runs whose name starts so
    python tools/study.py --study configs/studies/lambda.yaml --report-only
    python tools/study.py --study configs/studies/lambda.yaml --set scale=gpu --set run.name=lambda_gpu

Results: DIR/NAME/report.md, report.html, PNG files, and one run folder per arm and seed. Exit
codes: 0 done, 1 some run failed (the report says which), 2 wrong study file or folder, 130
interrupted.
"""

import argparse
import os
import signal
import sys


def main() -> int:
    options = parse()
    # Before torch starts threads: one that spins for a core held by another process slows small
    # machines severalfold.
    os.environ.setdefault("GOMP_SPINCOUNT", "100000")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        from dsv3_mtp.study.matrix import load_study

        loaded = load_study(options.study, options.sets)
        if options.dry_run:
            from dsv3_mtp.study.dryrun import dry_run

            print(dry_run(loaded, jobs=options.jobs))
            return 0
        failed = [] if options.report_only else run(loaded, options)
        from dsv3_mtp.study.report import write_report

        try:
            print(f"report: {write_report(loaded)}")
        except ValueError as error:
            if not failed:
                raise
            print(error, file=sys.stderr)
        return 1 if failed else 0
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        return 130


def run(loaded, options: argparse.Namespace) -> list[str]:
    import torch

    from dsv3_mtp.study.run import run_study

    prefixes = tuple(options.only or [""])
    jobs = options.jobs or (1 if torch.cuda.is_available() else len(os.sched_getaffinity(0)))
    return run_study(loaded, only=lambda run: run.name.startswith(prefixes), jobs=jobs)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--study", required=True, metavar="YAML")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        dest="sets",
        metavar="a.b=c",
        help="override a key of the study file, e.g. scale=gpu or 'seeds=[1, 2]'; repeatable",
    )
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help="only runs whose name starts with one of these"
    )
    parser.add_argument(
        "--jobs",
        type=int,
        metavar="N",
        help="runs at a time (default: CPU cores; on a GPU and for --dry-run 1)",
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--dry-run", action="store_true", help="print the matrix and its cost; run nothing"
    )
    what.add_argument("--report-only", action="store_true", help="report on what has been run")
    options = parser.parse_args()
    if options.only and (options.dry_run or options.report_only):
        parser.error("--only chooses what is run; it does not go with --dry-run or --report-only")
    if options.jobs is not None and options.jobs < 1:
        parser.error(f"--jobs {options.jobs}: must be at least 1")
    return options


if __name__ == "__main__":
    sys.exit(main())
