"""Train a model, or go on with an interrupted run: the same command does both.

    dsv3 train --config v3_tiny.yaml                             # one process, CPU or GPU
    deepspeed tools/train.py --config configs/v3_tiny.yaml       # from a clone; or with torchrun

Once training has begun, SIGTERM and Ctrl-C save a checkpoint and exit 0. Exit codes: 0 done or
stopped on request, 1 training failed, 2 wrong config, data or run folder.
"""

import argparse
import gc
import sys

from dsv3_mtp.cli import plan
from dsv3_mtp.cli.command import Failure, add_config

INTERRUPTED = "interrupted before the run could save; it goes on from its last checkpoint"


def add_options(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    text = "print what the run would be, as `dsv3 plan` does"
    parser.add_argument("--dry-run", action="store_true", help=text)
    plan.add_plan_options(parser, "with --dry-run: ")
    text = "write a trace of these steps into the run folder: trace.rank0.json.gz"
    parser.add_argument("--profile", metavar="steps=FIRST:LAST", help=text)
    # the deepspeed launcher adds it
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)


def check(options: argparse.Namespace) -> str | None:
    if options.plot and not options.dry_run:
        return "--plot goes with --dry-run; a run draws its own curves.png"
    if options.yaml and not options.dry_run:
        return "--yaml goes with --dry-run; a run folder has config.yaml and ds_config.json"
    if options.world_size is not None and not options.dry_run:
        return "--world-size goes with --dry-run; a run has the ranks that its launcher starts"
    if options.profile is not None and options.dry_run:
        return "--profile is of a run; --dry-run has no steps"
    return None


def run(options: argparse.Namespace) -> None:
    if options.dry_run:
        plan.run(options)
        return
    from dsv3_mtp.config import load_config

    config = load_config(options.config, options.sets)
    from dsv3_mtp.train.process import own_process
    from dsv3_mtp.train.profile import parse_steps
    from dsv3_mtp.train.record import NonFiniteError

    steps = range(0) if options.profile is None else parse_steps(options.profile)
    # DeepSpeed collects garbage up to six times as it starts: 0.2 s each over all that was imported
    gc.freeze()
    try:
        own_process(config, command=sys.argv, profile=steps).run()
    except NonFiniteError as error:
        raise Failure(f"training stopped: {error}") from error
    from dsv3_mtp.parallel.launch import finish

    finish()
