"""Turn a checkpoint in DeepSeek-V3's layout (bf16, fp32 or block-FP8, any number of shards) into a
run.

    dsv3 import --from hf/v3_tiny --out runs/continued --data data/pystdlib-2048
    dsv3 train --config runs/continued/config.yaml

A fresh MTP module on a frozen trunk:

    dsv3 import --from DIR --out runs/head --data data/web --frozen

Without --config batch, length and, with --frozen, learning rate follow the model's size; --set
changes them. The last lines say how long that takes, and what to do next.

Exit codes: 0 done, 2 the checkpoint or the config cannot be used; everything wrong is listed and
nothing is written.
"""

import argparse

from dsv3_mtp.cli.command import add_sets, find_config

INTERRUPTED = "interrupted; nothing is written"


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    text = "config.json and *.safetensors"
    add("--from", dest="source", required=True, metavar="DIR", help=text)
    add("--out", required=True, metavar="RUN", help="run folder to make")
    text = "take all sections but `model` from this run's config"
    add("--config", metavar="YAML", type=find_config, help=text)
    add("--data", metavar="DIR", help="prepared folder for data.train and data.val")
    add_sets(parser)
    text = "of the weights (default: as stored; bf16 for FP8)"
    add("--dtype", choices=["bf16", "fp32"], help=text)
    text = "train MTP modules on this trunk, which stays as it is and where it is"
    add("--frozen", action="store_true", help=text)
    text = (
        "the state of the trunk that its MTP module was trained on (default: post_norm, as "
        "DeepSeek's; torchtitan's: pre_norm)"
    )
    add("--trunk-hidden", choices=["post_norm", "pre_norm"], help=text)
    add("--trunk-only", action="store_true", help="leave the MTP modules out")


def run(options: argparse.Namespace) -> None:
    from dsv3_mtp.hf import import_hf
    from dsv3_mtp.plan.outlook import outlook

    keys = ("sets", "data", "dtype", "trunk_only", "frozen", "trunk_hidden")
    what = {key: getattr(options, key) for key in keys}
    notes = import_hf(options.source, options.out, base=options.config, **what)
    notes += [f"wrote {options.out}", *outlook(options.out)]
    print("\n".join(sorted(notes, key=lambda note: note.startswith("next: "))))  # last, in order
