"""Write a run's newest checkpoint in DeepSeek-V3's layout: loads in transformers, vLLM and SGLang.

    python tools/export_hf.py --run runs/v3_tiny --out hf/v3_tiny
    python tools/export_hf.py --run runs/v3_tiny --out hf/v3_tiny_fp8 --dtype fp8

docs/huggingface.md says how to serve the result. Exit codes: 0 done, 2 the run cannot be exported;
nothing is written.
"""

import argparse
import sys


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
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
    parser.add_argument("--trunk-only", action="store_true", help="leave the MTP modules out")
    parser.add_argument(
        "--ema", action="store_true", help="the average of the weights (train.ema_decay)"
    )
    options = parser.parse_args()
    try:
        from dsv3_mtp.hf import export_hf

        what = {"dtype": options.dtype, "trunk_only": options.trunk_only, "ema": options.ema}
        notes = export_hf(options.run, options.out, **what)
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
