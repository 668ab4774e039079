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
    parser.add_argument(
        "--run", required=True, metavar="RUN", help="run folder with config.yaml and checkpoints"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to make")
    parser.add_argument(
        "--dtype",
        choices=["bf16", "fp8", "fp32"],
        help="fp8: E4M3 projections with 128x128 scales, the rest bf16 (default: bf16; of a "
        "frozen trunk its own files, copied as they are, and the modules in their type)",
    )
    parser.add_argument(
        "--for",
        dest="reader",
        choices=["transformers", "vllm", "sglang"],
        help="refuse what this reader does not load, or reads wrongly (default: say it of all)",
    )
    parser.add_argument("--trunk-only", action="store_true", help="leave the MTP modules out")
    add_run_options(parser)


def run(options: argparse.Namespace) -> None:
    from dsv3_mtp.hf import export_hf

    what = {"dtype": options.dtype, "trunk_only": options.trunk_only, "ema": options.ema}
    what["reader"] = options.reader
    what["trust_code"] = options.trust_code
    notes = export_hf(options.run, options.out, **what)
    print("\n".join([*notes, f"wrote {options.out}"]))
