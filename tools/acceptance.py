"""Acceptance of a run's drafts by position, over continuations of real validation text.

    python tools/acceptance.py --run runs/v3_tiny runs/v3_tiny_parallel --draft-depth 2

Each row decodes the same prefixes speculatively, greedy and sampled at temperature 1. "joint" is
P(drafts 1..k all accepted), "conditional" P(draft k accepted | those before it). A model that
repeats itself accepts everything: look at the validation loss and at the share of distinct tokens
too. Exit codes: 0 done, 2 wrong options or run.
"""

import argparse
import sys
from typing import Any


def main() -> int:
    options = parse()
    import torch

    torch.set_num_threads(options.threads)
    print(
        f"{'run':24}{'heads':18}{'T':>4}{'tokens/step':>13}{'distinct':>10} "
        f" {'joint':26}conditional"
    )
    try:
        for run in options.run:
            for line in rows(run, options):
                print(line, flush=True)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", nargs="+", required=True, metavar="DIR", help="run folders")
    parser.add_argument("--draft-depth", type=int, default=2, metavar="K", help="default: 2")
    parser.add_argument("--prefixes", type=int, default=64, metavar="N", help="default: 64")
    parser.add_argument("--prefix-tokens", type=int, default=96, metavar="N", help="default: 96")
    parser.add_argument("--new-tokens", type=int, default=32, metavar="N", help="default: 32")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="default: 1")
    options = parser.parse_args()
    least = {
        "draft_depth": 1,
        "prefixes": 1,
        "prefix_tokens": 1,
        "new_tokens": 3,
        "threads": 1,
    }  # 2: nothing to draft
    for key, bound in least.items():
        if getattr(options, key) < bound:
            parser.error(
                f"--{key.replace('_', '-')} {getattr(options, key)}: must be at least {bound}"
            )
    return options


def rows(folder: str, options: argparse.Namespace) -> list[str]:
    from dsv3_mtp.decode.generate import Settings, generate
    from dsv3_mtp.runs.model import load_run

    run = load_run(folder)
    prompts, lines = validation_prefixes(run.config, options), []
    for temperature in (0.0, 1.0):
        settings = Settings(
            max_new_tokens=options.new_tokens,
            draft_depth=options.draft_depth,
            temperature=temperature,
        )
        out = generate(run.model, prompts, settings)
        joint, conditional = (
            " ".join(f"{p:.3f}" for p in x)
            for x in (out.acceptance.joint, out.acceptance.conditional)
        )
        heads = f"{run.config.mtp.mode} D={run.model.depths}"
        counts = f"{out.acceptance.tokens_per_step:>13.2f}{out.distinct:>10.2f}"
        lines.append(
            f"{run.config.run.name:24}{heads:18}{temperature:>4.0f}{counts} "
            f" {joint:26}{conditional}"
        )
    return lines


def validation_prefixes(config: Any, options: argparse.Namespace) -> list[list[int]]:
    """The same places of the validation split for every run with the same data."""
    from dsv3_mtp.data.opening import validation_source
    from dsv3_mtp.data.sampler import sequential_windows

    task = config.data.task
    if task is not None and task.has_answers:
        raise ValueError(
            f"{config.run.name}: data.task {task.type} has "
            "no text; tools/evaluate.py drafts its answers"
        )
    needed, longest = (
        options.prefix_tokens + options.new_tokens,
        config.model.max_position_embeddings,
    )
    if needed > longest:
        text = (
            "--prefix-tokens + --new-tokens must be <= "
            f"model.max_position_embeddings = {longest} (got {needed})"
        )
        raise ValueError(f"{config.run.name}: {text}")
    size = {"seq_len": options.prefix_tokens, "count": options.prefixes}
    [(tokens, *_)] = sequential_windows(validation_source(config), lookahead=0, **size)
    return tokens.tolist()


if __name__ == "__main__":
    sys.exit(main())
