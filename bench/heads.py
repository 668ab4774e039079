"""Tokens per step and time per token of several runs, such as heads on one frozen trunk.

Example:
    python bench/heads.py runs/objectives_nano/chain_kl-seed1 runs/objectives_nano/medusa_kl-seed1

Every run continues the same windows of its validation text, one at a time, with as many drafts as
it has depths (--draft-depth: at most so many) and without drafts; all of that takes turns in one
process. A time is of a token, the prompt's included, in CPU seconds of one thread; a ratio is the
plain time over the drafting one of the same run, with its quartiles over the rounds, so that above
1 drafts pay. Exit codes: 0 done, 2 wrong options or run.
"""

import argparse
import inspect
import sys
from functools import partial
from pathlib import Path
from typing import Any

from timing import interleave, quartiles, ratios

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dsv3_mtp.cli.command import at_least


def main() -> int:
    options = parse()
    import torch

    torch.set_num_threads(1)
    try:
        runs = {folder: Drafting(folder, options) for folder in options.runs}
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    variants = {folder: partial(run.decode, run.drafts) for folder, run in runs.items()}
    variants |= {f"{folder}, plain": partial(run.decode, 0) for folder, run in runs.items()}
    seconds = interleave(variants, options.rounds, torch.device("cpu"))
    print(
        f"{options.prompts} prompts of {options.prompt_tokens} tokens, {options.new_tokens} new, "
        f"temperature {options.temperature:g}, batch 1, {options.rounds} rounds, one thread"
    )
    print(
        "| run | heads | parameters of the heads | lines of code | tokens per step | us per token "
        "| plain / drafting |\n|---|---|---|---|---|---|---|"
    )
    for folder, run in runs.items():
        own = seconds[folder]
        low, middle, high = ratios(seconds[f"{folder}, plain"], own)
        time = quartiles(own)[1] / (options.prompts * options.new_tokens) * 1e6
        print(
            f"| {Path(folder).name} | {run.describe()} | {time:.0f} "
            f"| {middle:.2f} [{low:.2f}, {high:.2f}] |"
        )
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders")
    for name, default in (("prompts", 8), ("prompt-tokens", 32), ("new-tokens", 32), ("rounds", 5)):
        parser.add_argument(
            f"--{name}", type=at_least(1), default=default, metavar="N", help=f"default: {default}"
        )
    parser.add_argument("--draft-depth", type=at_least(1), metavar="K", help="default: the depths")
    parser.add_argument("--temperature", type=float, default=1.0, metavar="T", help="default: 1")
    return parser.parse_args()


class Drafting:
    """One run and its prompts."""

    def __init__(self, folder: str, options: argparse.Namespace):
        """Raises ValueError where the run cannot be read, or nothing drafts with its heads."""
        from dsv3_mtp.data.opening import open_sources
        from dsv3_mtp.data.sampler import sequential_windows
        from dsv3_mtp.decode.draft import draft_limit, no_drafter
        from dsv3_mtp.runs.model import load_model

        run = load_model(folder)
        self.model, self.options = run.model, options
        self.found: list[Any] = []  # of the last decoding with drafts
        if why := no_drafter(self.model.mtp_config):
            raise ValueError(f"{folder}: {why}")
        self.drafts = draft_limit(self.model, options.draft_depth or self.model.depths)
        _, val = open_sources(run.config)
        if val.text is None:
            raise ValueError(f"{folder}: its validation is a task, not text")
        sizes = {"seq_len": options.prompt_tokens, "lookahead": 0, "count": options.prompts}
        [(rows, _)] = sequential_windows(val.text, **sizes)
        self.prompts = rows.tolist()

    def decode(self, drafts: int) -> None:
        from dsv3_mtp.decode.generate import Settings, generate

        settings = Settings(
            self.options.new_tokens, draft_depth=drafts, temperature=self.options.temperature
        )
        found = [generate(self.model, [prompt], settings) for prompt in self.prompts]
        if drafts:
            self.found = found

    def describe(self) -> str:
        """Cells: the kind of head, its parameters, lines of its file, tokens per step."""
        head: Any = self.model.mtp
        size = sum(parameter.numel() for parameter in head.parameters())
        lines = len(Path(inspect.getfile(type(head))).read_text().splitlines())
        steps = sum(one.acceptance.steps for one in self.found)
        tokens = sum(one.acceptance.tokens_per_step * one.acceptance.steps for one in self.found)
        return f"{head.name}, {self.drafts} drafts | {size:,} | {lines} | {tokens / steps:.2f}"


if __name__ == "__main__":
    sys.exit(main())
