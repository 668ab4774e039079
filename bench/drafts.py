"""Time per token of drafting with a trained run, against plain decoding, for several batches: as it
is, in int8, with a threshold, and with a draft vocabulary.

    python bench/drafts.py --run runs/v3_tiny --thresholds 0.5 0.8 --vocab 256

Prompts are windows of the run's validation text, decoded so many at a time as a batch has rows.
With few new tokens a continuation stays near the text; a long greedy one repeats itself, and then
drafts stand more often. Times are of the steps, without the prompts, in CPU seconds of one thread.
Variants take turns, every round on prompts of its own. The speed is the time per token of plain
decoding over the variant's: the median of the rounds and their quartiles. Break-even is what that
speed would have needed: a step's time over a plain step's. Exit codes: 0 done, 2 a wrong option or
run.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dsv3_mtp.cli.command import at_least


def main() -> int:
    options = parse()
    import torch
    from timing import interleave

    torch.set_num_threads(1)
    try:
        model, prompts, settings = load(options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for rows in options.batches:
        variants = {
            name: Drafting(model, prompts, rows, use, options) for name, use in settings.items()
        }
        seconds = interleave(
            variants, options.rounds, torch.device("cpu"), timer=lambda own, device: own()
        )
        for name, own in variants.items():
            print(f"{rows:>3} rows  {name:24}{row(own, seconds[name], seconds['plain'])}")
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
    text = "prompts of a round, for each variant (default: 4)"
    parser.add_argument("--prompts", type=count, default=4, metavar="N", help=text)
    parser.add_argument("--prompt-tokens", type=count, default=64, metavar="N")
    parser.add_argument("--new-tokens", type=at_least(8), default=96, metavar="N")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: the run's own")
    parser.add_argument("--rounds", type=count, default=5, metavar="N")
    return parser.parse_args()


def load(options: argparse.Namespace) -> tuple[Any, list[list[int]], dict[str, Any]]:
    """Model, prompts of all rounds, and the settings of each variant."""
    import torch

    from dsv3_mtp.data.opening import validation_source
    from dsv3_mtp.data.sampler import sequential_windows
    from dsv3_mtp.decode.generate import Settings
    from dsv3_mtp.runs.frequencies import most_frequent
    from dsv3_mtp.runs.model import load_model

    run = load_model(options.run)
    if options.dtype is not None:
        for parameter in run.model.parameters():  # as in a run: router biases stay float32
            parameter.data = parameter.data.to(getattr(torch, options.dtype))
    source = validation_source(run.config, "val")
    most = max(*options.batches, options.prompts) * (1 + options.rounds)
    windows = sequential_windows(source, seq_len=options.prompt_tokens, lookahead=0, count=most)
    prompts = [row for rows, _ in windows for row in rows.tolist()]
    plain = {"max_new_tokens": options.new_tokens, "temperature": options.temperature}
    settings = {"plain": Settings(**plain)}
    for k in options.depths:
        drafting = plain | {"draft_depth": k}
        settings[f"K={k}"] = Settings(**drafting)
        settings[f"K={k}, int8"] = Settings(**drafting, draft_dtype="int8")
        for p in options.thresholds:
            settings[f"K={k}, P={p:g}"] = Settings(**drafting, draft_threshold=p)
        for size in options.vocab:
            ids = most_frequent(Path(options.run), run.config, size)
            settings[f"K={k}, N={size}"] = Settings(**drafting, draft_vocab=ids)
    return run.model, prompts, settings


class Drafting:
    """A variant, which decodes the next prompts at each call."""

    def __init__(
        self, model: Any, prompts: list[list[int]], rows: int, settings: Any, options: Any
    ):
        self.model, self.settings, self.rows = model, settings, rows
        size = rows * max(1, options.prompts // rows)
        chunks = [prompts[at : at + size] for at in range(0, len(prompts) - size + 1, size)]
        self.chunks = chunks[: 1 + options.rounds]
        self.calls = self.steps = self.tokens = 0

    def __call__(self) -> float:
        """CPU seconds per token of all rows."""
        import torch
        from timing import now

        from dsv3_mtp.decode.generate import stream

        chunk, device = self.chunks[self.calls % len(self.chunks)], torch.device("cpu")
        self.calls, seconds, tokens = self.calls + 1, 0.0, 0
        for at in range(0, len(chunk), self.rows):
            found = stream(self.model, chunk[at : at + self.rows], self.settings)
            for _ in range(self.rows):  # the first token of each row is of its prompt
                next(found)
            start = now(device)
            steps = list(found)
            seconds += now(device) - start
            tokens += sum(len(step.tokens) for step in steps)
            self.steps += len(steps)
        self.tokens += tokens
        return seconds / tokens


def row(own: Drafting, seconds: list[float], plain: list[float]) -> str:
    from timing import quartiles, ratios

    low, middle, high = ratios(plain, seconds)
    per_step = own.tokens / own.steps
    speed = f"{quartiles(seconds)[1] * 1e6:>8.0f} us/token{middle:>7.2f} [{low:.2f}, {high:.2f}]"
    return f"{speed}  {per_step:.2f} tokens/step, break-even {per_step / middle:.2f}"


if __name__ == "__main__":
    sys.exit(main())
