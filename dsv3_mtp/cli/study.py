"""Run a study: every arm and seed of a matrix as an ordinary run, then statistics and a report.

    dsv3 study --study studies/lambda --dry-run      # matrix, cost, power
    dsv3 study --study studies/lambda --jobs 2       # run it; the same command resumes
    dsv3 study --study studies/lambda --only v3_step # runs named so
    dsv3 study --study studies/lambda --report-only
    dsv3 study --study X.yaml --set scale=gpu --set run.name=X_gpu
    dsv3 study --study X.yaml --adopt runs/mine      # take over a finished run
    dsv3 study --from docs/studies/lambda            # rebuild a report from its archive
    dsv3 study --from docs/studies/lambda --resume   # and go on with its missing runs

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

from dsv3_mtp.cli.command import add_sets, at_least, find_config

INTERRUPTED = "interrupted; the same command goes on"


def add_options(parser: argparse.ArgumentParser) -> None:
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--study", type=find_config, metavar="YAML")
    text = "an archive, such as docs/studies/X"
    which.add_argument("--from", type=Path, dest="archive", metavar="FOLDER", help=text)
    add = parser.add_argument
    text = "with --from: import the code outside the package that configs there name"
    add("--trust-code", action="store_true", help=text)
    text = "where the report goes (default: beside the runs)"
    add("--out", type=Path, metavar="FOLDER", help=text)
    add_sets(parser)
    text = "only runs whose name starts with one of these"
    add("--only", nargs="+", metavar="NAME", help=text)
    text = "runs at a time (default: as many as the GPUs, or CPU cores, have room for)"
    add("--jobs", type=at_least(1, 1024), metavar="N", help=text)
    add = parser.add_mutually_exclusive_group().add_argument
    text = "print the matrix, its cost and its power; run nothing"
    add("--dry-run", action="store_true", help=text)
    add("--report-only", action="store_true", help="report on what has been run")
    text = "measure finished runs as the study's"
    add("--adopt", nargs="+", type=Path, metavar="RUN", help=text)
    add("--resume", action="store_true", help="with --from: run what the archive lacks")


def check(options: argparse.Namespace) -> str | None:
    """What of the options would have no effect."""
    modes = ("dry_run", "report_only", "adopt")
    if options.only and "" in options.only:
        return "--only '': must name an arm, or the beginning of a run's name"
    if options.only and any(getattr(options, mode) for mode in modes):
        return "--only chooses what is run; it does not go with what runs nothing"
    if options.resume and not options.archive:
        return "--resume goes with --from; a study of a file is resumed by the same command"
    if options.archive and any(getattr(options, mode) for mode in modes):
        return "--from rebuilds a report; with --resume it runs what is missing, nothing else"
    if options.archive and not options.resume and (options.only or options.jobs):
        return "--only and --jobs go with --from only beside --resume"
    if options.dry_run and options.out:
        return "--dry-run writes nothing; leave out --out"
    return None


def run(options: argparse.Namespace) -> int:
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    return rebuild(options) if options.archive and not options.resume else study_of(options)


def rebuild(options: argparse.Namespace) -> int:
    """The report of an archive, from nothing but the archive."""
    from dsv3_mtp.study.archive import read_archive
    from dsv3_mtp.study.plan import load_archive, read_plan
    from dsv3_mtp.study.report import write_report

    folder = options.archive
    loaded = load_archive(folder, tuple(options.sets), trust_code=options.trust_code)
    out = options.out or folder
    records = read_archive(folder, loaded.study.arms)
    print(f"report: {write_report(loaded, read_plan(folder), records, out)}")
    return 0


def study_of(options: argparse.Namespace) -> int:
    if options.archive:
        from dsv3_mtp.study.folder import load_archived

        loaded = load_archived(options.archive, tuple(options.sets), trust_code=options.trust_code)
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
        jobs = options.jobs or default_jobs(loaded.study.ranks)
        failed = run_study(loaded, only=lambda run: run.name.startswith(prefixes), jobs=jobs)
    try:
        print(f"report: {report_study(loaded, options.out)}")
    except ValueError as error:
        if not failed:
            raise
        print(error, file=sys.stderr)
    return 1 if failed else 0


def default_jobs(ranks: int) -> int:
    """Runs of so many processes that the GPUs of this host, or its cores, have room for."""
    from dsv3_mtp.study.run import devices

    return max(1, (devices() or len(os.sched_getaffinity(0))) // ranks)
