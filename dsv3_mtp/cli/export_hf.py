"""Write a run's newest checkpoint in DeepSeek-V3's layout: for transformers, vLLM and SGLang; says
which of them would not load it, or not use all of it.

    dsv3 export --run runs/v3_tiny --out hf/v3_tiny
    dsv3 export --run runs/v3_tiny --out hf/v3_tiny_fp8 --dtype fp8 --for transformers

docs/huggingface.md says how to serve the result. Exit codes: 0 done, 2 the run cannot be exported;
nothing is written.
"""

import argparse

from dsv3_mtp.cli.command import add_run_options

INTERRUPTED = "interrupted; nothing is written"


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--run", required=True, metavar="RUN", help="run folder with config.yaml and checkpoints")
    add("--out", required=True, metavar="DIR", help="folder to make")
    text = (
        "fp8: E4M3 projections with 128x128 scales, the rest bf16 (default: bf16; of a frozen "
        "trunk its own files, copied as they are, and the modules in their type)"
    )
    add("--dtype", choices=["bf16", "fp8", "fp32"], help=text)
    text = "refuse what this reader does not load, or reads wrongly (default: say it of all)"
    add("--for", dest="reader", choices=["transformers", "vllm", "sglang"], help=text)
    add("--trunk-only", action="store_true", help="leave the MTP modules out")
    add_run_options(parser)


def run(options: argparse.Namespace) -> None:
    from dsv3_mtp.hf import export_hf

    keys = ("dtype", "trunk_only", "ema", "reader", "trust_code")
    what = {key: getattr(options, key) for key in keys}
    notes = export_hf(options.run, options.out, **what)
    print("\n".join([*notes, f"wrote {options.out}"]))
