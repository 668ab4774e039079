"""Time per token of drafting with a trained run, against plain decoding, for several batches: as it
is, with a threshold, and with a draft vocabulary.

    python bench/drafts.py --run runs/v3_tiny --thresholds 0.5 0.8 --vocab 256

Prompts are windows of the run's validation text. Variants take turns round by round, in CPU seconds
of one thread. A ratio is the time per token of plain decoding over the variant's: the median of the
rounds and their quartiles. Exit codes: 0 done, 2 a wrong option or run.
"""

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dsv3_mtp.cli.command import at_least


def main() -> int:
    options = parse()
    import torch
    from timing import interleave, ratios

    from dsv3_mtp.decode.generate import generate

    torch.set_num_threads(1)
    try:
        model, prompts, settings = load(options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for rows in options.batches:
        variants = {
            name: partial(generate, model, prompts[:rows], use) for name, use in settings.items()
        }
        seconds = interleave(variants, options.rounds, torch.device("cpu"))
        for name, times in seconds.items():
            out = variants[name]()
            low, middle, high = ratios(seconds["plain"], times)
            micro = sorted(times)[len(times) // 2] / sum(map(len, out.tokens)) * 1e6
            row = f"{rows:>3} rows  {name:24}{micro:>8.0f} us/token"
            row += f"{middle:>7.2f} [{low:.2f}, {high:.2f}]"
            print(f"{row}  {out.acceptance.tokens_per_step:.2f} tokens/step", flush=True)
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    count = at_least(1)
    parser.add_argument("--run", required=True, metavar="DIR")
    parser.add_argument("--depths", type=count, nargs="+", default=[1, 2], metavar="K")
    parser.add_argument("--thresholds", type=float, nargs="*", default=[0.5], metavar="P")
    parser.add_argument("--vocab", type=count, nargs="*", default=[], metavar="N")
    parser.add_argument("--batches", type=count, nargs="+", default=[1, 4, 16], metavar="B")
    parser.add_argument("--prompt-tokens", type=count, default=64, metavar="N")
    parser.add_argument("--new-tokens", type=count, default=96, metavar="N")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T")
    parser.add_argument("--rounds", type=count, default=5, metavar="N")
    return parser.parse_args()


def load(options: argparse.Namespace) -> tuple[Any, list[list[int]], dict[str, Any]]:
    """Model, prompts, and the settings of each variant."""
    from dsv3_mtp.data.opening import validation_source
    from dsv3_mtp.data.sampler import sequential_windows
    from dsv3_mtp.decode.generate import Settings
    from dsv3_mtp.runs.frequencies import most_frequent
    from dsv3_mtp.runs.model import load_model

    run = load_model(options.run)
    source = validation_source(run.config, "val")
    most = max(options.batches)
    windows = sequential_windows(source, seq_len=options.prompt_tokens, lookahead=0, count=most)
    prompts = windows[0][0].tolist()
    plain = {"max_new_tokens": options.new_tokens, "temperature": options.temperature}
    settings = {"plain": Settings(**plain)}
    for k in options.depths:
        drafting = plain | {"draft_depth": k}
        settings[f"K={k}"] = Settings(**drafting)
        for p in options.thresholds:
            settings[f"K={k}, P={p:g}"] = Settings(**drafting, draft_threshold=p)
        for size in options.vocab:
            ids = most_frequent(Path(options.run), run.config, size)
            settings[f"K={k}, N={size}"] = Settings(**drafting, draft_vocab=ids)
    return run.model, prompts, settings


if __name__ == "__main__":
    sys.exit(main())
