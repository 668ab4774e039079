"""What a run would be, without running it: sizes, cost, GPU-hours, memory, traffic.

dsv3 plan --config v3_tiny.yaml
dsv3 plan --config v3_671b.yaml --world-size 2048 --plot
"""

import argparse
import os

from dsv3_mtp.cli.command import add_config, at_least


def add_options(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    add_plan_options(parser)


def add_plan_options(parser: argparse.ArgumentParser, note: str = "") -> None:
    add, ranks = parser.add_argument, f"{note}plan for N ranks (default: 1)"
    add("--world-size", type=at_least(1), metavar="N", help=ranks)
    add("--plot", action="store_true", help=f"{note}draw the schedules into the run folder")
    text = f"{note}print the whole config and DeepSpeed's JSON too"
    add("--yaml", action="store_true", help=text)


def run(options: argparse.Namespace) -> None:
    from dsv3_mtp.config import load_config
    from dsv3_mtp.plan.dryrun import dry_run

    config = load_config(options.config, options.sets)
    if int(os.environ.get("RANK", "0")) == 0:
        ranks = options.world_size or int(os.environ.get("WORLD_SIZE", "1"))
        print(dry_run(config, world_size=ranks, plot=options.plot, settings=options.yaml))
