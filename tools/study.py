"""Run a study: every arm and seed of a matrix as an ordinary run, then statistics and a report.

    python tools/study.py --study configs/studies/lambda.yaml --dry-run     # matrix, cost, power
    python tools/study.py --study configs/studies/lambda.yaml --jobs 2      # run it; the same
    resumes python tools/study.py --study configs/studies/lambda.yaml --only v3_step   # runs named
    so python tools/study.py --study configs/studies/lambda.yaml --report-only python tools/study.py
    --study X.yaml --set scale=gpu --set run.name=X_gpu python tools/study.py --study X.yaml --adopt
    runs/mine               # take over a finished run python tools/study.py --from
    docs/studies/lambda              # rebuild a report from its archive python tools/study.py
    --from docs/studies/lambda --resume     # and go on with its missing runs python tools/study.py
    --compare runs/a runs/b --out runs/a_b         # ordinary runs side by side

Several of these commands may work on one study at a time, on every machine that sees its folder.
Results: DIR/NAME/report.md, report.html, PNG files, results.jsonl and plan.json (the archive), and
one run folder per arm and seed. Exit codes: 0 done, 1 some run failed (the report says which), 2
wrong study file, archive or folder, 130 interrupted.
"""

import argparse
import os
import signal
import sys
from pathlib import Path


def main() -> int:
    options = parse()
    # Before torch starts threads: one that spins for a core held by another process slows small
    # machines severalfold.
    os.environ.setdefault("GOMP_SPINCOUNT", "100000")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        if options.compare:
            from dsv3_mtp.study.compare import compare

            text, page = compare(options.compare, options.out)
            print(f"{text}\npage: {page}")
            return 0
        return rebuild(options) if options.archive and not options.resume else study(options)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        return 130


def rebuild(options: argparse.Namespace) -> int:
    """The report of an archive, from nothing but the archive."""
    from dsv3_mtp.study.archive import read_archive
    from dsv3_mtp.study.plan import load_archive, read_plan
    from dsv3_mtp.study.report import write_report

    folder = options.archive
    loaded = load_archive(folder, tuple(options.sets))
    out = options.out or folder
    print(f"report: {write_report(loaded, read_plan(folder), read_archive(folder), out)}")
    return 0


def study(options: argparse.Namespace) -> int:
    if options.archive:
        from dsv3_mtp.study.folder import load_archived

        loaded = load_archived(options.archive, tuple(options.sets))
    else:
        from dsv3_mtp.study.load import load_study

        loaded = load_study(options.study, options.sets)
    from dsv3_mtp.study.corpus import corpus_note

    if (note := corpus_note(loaded)) is not None:
        print(note, file=sys.stderr)
    if options.dry_run:
        from dsv3_mtp.study.dryrun import dry_run

        print(dry_run(loaded, jobs=options.jobs))
        return 0
    from dsv3_mtp.study.folder import adopt, report_study
    from dsv3_mtp.study.run import run_study

    failed: list[str] = []
    if options.adopt:
        adopt(loaded, options.adopt)
    elif not options.report_only:
        prefixes = tuple(options.only or [""])
        jobs = options.jobs or default_jobs()
        failed = run_study(loaded, only=lambda run: run.name.startswith(prefixes), jobs=jobs)
    try:
        print(f"report: {report_study(loaded, options.out)}")
    except ValueError as error:
        if not failed:
            raise
        print(error, file=sys.stderr)
    return 1 if failed else 0


def default_jobs() -> int:
    from dsv3_mtp.study.run import devices

    return devices() or len(os.sched_getaffinity(0))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--study", metavar="YAML")
    which.add_argument(
        "--from",
        type=Path,
        dest="archive",
        metavar="FOLDER",
        help="an archive, such as docs/studies/X",
    )
    which.add_argument(
        "--compare", nargs="+", type=Path, metavar="RUN", help="ordinary run folders, side by side"
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="where the report goes (default: beside the runs)",
    )
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
        "--dry-run",
        action="store_true",
        help="print the matrix, its cost and its power; run nothing",
    )
    what.add_argument("--report-only", action="store_true", help="report on what has been run")
    what.add_argument(
        "--adopt", nargs="+", type=Path, metavar="RUN", help="measure finished runs as the study's"
    )
    what.add_argument(
        "--resume", action="store_true", help="with --from: run what the archive lacks"
    )
    options = parser.parse_args()
    refuse_what_has_no_effect(parser, options)
    return options


def refuse_what_has_no_effect(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    modes = ("dry_run", "report_only", "adopt")
    if options.only and any(getattr(options, mode) for mode in modes):
        parser.error("--only chooses what is run; it does not go with what runs nothing")
    if options.jobs is not None and options.jobs < 1:
        parser.error(f"--jobs {options.jobs}: must be at least 1")
    if options.resume and not options.archive:
        parser.error("--resume goes with --from; a study of a file is resumed by the same command")
    if options.archive and any(getattr(options, mode) for mode in modes):
        parser.error(
            "--from rebuilds a report; with --resume it runs what is missing, nothing else"
        )
    if options.archive and not options.resume and (options.only or options.jobs):
        parser.error("--only and --jobs go with --from only beside --resume")
    if options.compare and (
        options.only
        or options.jobs
        or options.sets
        or any(getattr(options, mode) for mode in modes)
    ):
        parser.error("--compare takes runs and --out, nothing else")
    if options.compare and options.out is None:
        parser.error("--compare needs --out FOLDER for its page and pictures")
    if options.dry_run and options.out:
        parser.error("--dry-run writes nothing; leave out --out")


if __name__ == "__main__":
    sys.exit(main())
