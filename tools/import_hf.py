"""Turn a checkpoint in DeepSeek-V3's layout (bf16, fp32 or block-FP8, any number of shards) into a
run.

    python tools/import_hf.py --from hf/v3_tiny --out runs/continued --data data/pystdlib-2048
    deepspeed tools/train.py --config runs/continued/config.yaml

A fresh MTP module on a frozen trunk:

    python tools/import_hf.py --from DIR --out runs/head --data data/web --frozen

Exit codes: 0 done, 2 the checkpoint or the config cannot be used; everything wrong is listed and
    nothing is written.
"""

import argparse
import sys


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--from", dest="source", required=True, metavar="DIR", help="config.json and *.safetensors"
    )
    parser.add_argument("--out", required=True, metavar="RUN", help="run folder to make")
    parser.add_argument(
        "--config", metavar="YAML", help="take all sections but `model` from this run's config"
    )
    parser.add_argument("--data", metavar="DIR", help="prepared folder for data.train and data.val")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        dest="sets",
        metavar="a.b=c",
        help="override a setting of the run; repeatable",
    )
    parser.add_argument(
        "--dtype",
        choices=["bf16", "fp32"],
        help="of the weights (default: as stored; bf16 for FP8)",
    )
    parser.add_argument(
        "--frozen",
        action="store_true",
        help="train MTP modules on this trunk, which stays as it is and where it is",
    )
    parser.add_argument("--trunk-only", action="store_true", help="leave the MTP modules out")
    options = parser.parse_args()
    try:
        from dsv3_mtp.hf import import_hf
        from dsv3_mtp.plan.outlook import outlook

        notes = import_hf(
            options.source,
            options.out,
            base=options.config,
            sets=options.sets,
            data=options.data,
            dtype=options.dtype,
            trunk_only=options.trunk_only,
            frozen=options.frozen,
        )
        notes += outlook(options.out)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; nothing is written", file=sys.stderr)
        return 130
    print("\n".join([*notes, f"wrote {options.out}"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
