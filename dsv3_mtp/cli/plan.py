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
    parser.add_argument(
        "--world-size", type=at_least(1), metavar="N", help=f"{note}plan for N ranks (default: 1)"
    )
    parser.add_argument(
        "--plot", action="store_true", help=f"{note}draw the schedules into the run folder"
    )
    parser.add_argument(
        "--yaml", action="store_true", help=f"{note}print the whole config and DeepSpeed's JSON too"
    )


def run(options: argparse.Namespace) -> None:
    from dsv3_mtp.config import load_config
    from dsv3_mtp.plan.dryrun import dry_run

    config = load_config(options.config, options.sets)
    if int(os.environ.get("RANK", "0")) == 0:
        ranks = options.world_size or int(os.environ.get("WORLD_SIZE", "1"))
        print(dry_run(config, world_size=ranks, plot=options.plot, settings=options.yaml))
