"""Train a model: `deepspeed tools/train.py --config configs/v3_tiny.yaml`, or with torchrun, or
with plain python.

The same command continues an interrupted run. Once training has begun, SIGTERM and Ctrl-C save a
checkpoint and exit 0. Exit codes: 0 done or stopped on request, 1 training failed, 2 wrong config,
data or run folder.
"""

import argparse
import gc
import os
import sys
import time


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, metavar="YAML")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        dest="sets",
        metavar="a.b=c",
        help="override a setting; repeatable",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print config, sizes and DeepSpeed JSON; run nothing"
    )
    parser.add_argument(
        "--world-size", type=int, metavar="N", help="with --dry-run: plan for N ranks"
    )
    parser.add_argument(
        "--plot", action="store_true", help="with --dry-run: draw the schedules into the run folder"
    )
    # the deepspeed launcher adds it
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.plot and not args.dry_run:
        parser.error("--plot goes with --dry-run; a run draws its own curves.png")
    if args.world_size is not None and not (args.dry_run and args.world_size > 0):
        parser.error(
            "--world-size goes with --dry-run and is >= 1; "
            "a run has the ranks that its launcher starts"
        )
    is_main = int(os.environ.get("RANK", "0")) == 0
    # Before torch starts threads: one that spins for a core held by another process slows small
    # machines severalfold.
    os.environ.setdefault("GOMP_SPINCOUNT", "100000")
    try:
        from dsv3_mtp.config import load_config

        config = load_config(args.config, args.sets)
        if args.dry_run:
            from dsv3_mtp.plan.dryrun import dry_run

            if is_main:
                ranks = args.world_size or int(os.environ.get("WORLD_SIZE", "1"))
                print(dry_run(config, world_size=ranks, plot=args.plot))
            return 0
        from dsv3_mtp.train.trainer import NonFiniteError, Trainer

        # DeepSpeed collects garbage up to six times as it starts: 0.2 s each over all that was
        # imported
        gc.freeze()
        try:
            Trainer(config, command=sys.argv).run()
        except NonFiniteError as error:
            return fail(f"training stopped: {error}", 1, is_main=is_main)
    except (ValueError, OSError) as error:
        return fail(str(error), 2, is_main=is_main)
    except KeyboardInterrupt:
        return fail(
            "interrupted before the run could save; it goes on from its last checkpoint",
            130,
            is_main=True,
        )
    from dsv3_mtp.parallel.launch import finish

    finish()
    return 0


def fail(message: str, code: int, *, is_main: bool) -> int:
    """Most errors are found by every rank: rank 0 says it, and the launcher ends the others while
    they wait.
    """
    if is_main:
        print(message, file=sys.stderr, flush=True)
    else:
        time.sleep(10)
        print(f"rank {os.environ['RANK']}: {message}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(code)  # not sys.exit: gloo's threads may abort a normal exit and change the code


if __name__ == "__main__":
    sys.exit(main())
