"""Decode speed at batch 1: plain and speculative for K = 1..4, against transformers' generate() on
the same weights.

Examples:
    python bench/decode.py                                   # a random model of 12M parameters
    python bench/decode.py --run runs/v3_tiny --prompt 'def '
    python bench/decode.py --compile                         # also with torch.compile (minutes)
All variants take turns in one process, round by round; times are CPU seconds of one thread, ratios
are medians of the rounds' ratios, so that other work on the machine touches them little. Exit
codes: 0 done, 2 wrong options or run.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from models import TINY, check_transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import llama
from decode_costs import measure, steps_report

from dsv3_mtp.cli.command import at_least

CONFIG = Path(__file__).resolve().parents[1] / "configs/v3_tiny.yaml"
RANDOM_MODEL = TINY | {"max_position_embeddings": 512, "initializer_range": 0.05}


def main() -> int:
    options = parse()
    import torch

    torch.set_num_threads(options.threads)
    try:
        model, prompt, name = load(options)
        variants = make_variants(model, prompt, options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(
        f"{name}\nprompt of {len(prompt)} tokens, {options.new_tokens} "
        f"new, greedy, batch 1, {options.rounds} rounds"
    )
    seconds = measure(variants, options.rounds)
    print(report(variants, seconds, options))
    beyond = [str(k) for k in options.depths if model.depths and f"K={k}" not in variants]
    if beyond:
        print(
            f"not run: K={', '.join(beyond)}; independent "
            f"heads draft at most D = {model.depths} tokens"
        )
    for rows in options.batches:
        print(steps_report(model, prompt, options, rows))
    print(llama.report(options.llama, model, prompt, options.new_tokens, options.rounds))
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    text = "run folder (default: random weights, see the source)"
    parser.add_argument("--run", metavar="DIR", help=text)
    parser.add_argument("--prompt", metavar="TEXT", help="with --run (default: 'def ')")
    parser.add_argument(
        "--prompt-tokens", type=at_least(1), metavar="N", help="without --run (default: 64)"
    )
    parser.add_argument(
        "--new-tokens", type=at_least(1), default=64, metavar="N", help="default: 64"
    )
    parser.add_argument("--rounds", type=at_least(1), default=7, metavar="N", help="default: 7")
    parser.add_argument(
        "--depths",
        type=at_least(1),
        nargs="*",
        default=[1, 2, 3, 4],
        metavar="K",
        help="default: 1 2 3 4",
    )
    parser.add_argument(
        "--thresholds",
        type=float,
        nargs="*",
        default=[],
        metavar="P",
        help="also the largest K with --draft-threshold P",
    )
    parser.add_argument(
        "--batches",
        type=at_least(1),
        nargs="+",
        default=[1, 4, 16],
        metavar="B",
        help="rows decoded together, for the break-even of drafts (default: 1 4 16)",
    )
    parser.add_argument("--threads", type=at_least(1), default=1, metavar="N", help="default: 1")
    parser.add_argument("--compile", action="store_true", help="also measure compiled steps")
    text = "an interpreter with llama-cpp-python and gguf: also llama.cpp (default: this one)"
    parser.add_argument("--llama", default=sys.executable, metavar="PYTHON", help=text)
    parser.add_argument(
        "--hf-mtp", metavar="DIR", help="exported folder: also transformers' generate(use_mtp=True)"
    )
    options = parser.parse_args()
    if options.run is None and options.prompt is not None:
        parser.error(
            "--prompt: no effect without --run; random weights read --prompt-tokens random tokens"
        )
    if options.run is not None and options.prompt_tokens is not None:
        parser.error("--prompt-tokens: no effect with --run, which reads --prompt")
    options.prompt = "def " if options.prompt is None else options.prompt
    options.prompt_tokens = 64 if options.prompt_tokens is None else options.prompt_tokens
    return options


def load(options: argparse.Namespace) -> tuple[Any, list[int], str]:
    """Model, prompt, and a line that says what it is."""
    import torch

    from dsv3_mtp.config import ModelConfig, MTPConfig, load_config
    from dsv3_mtp.model.causal_lm import DeepseekV3MTP
    from dsv3_mtp.model.size import model_size

    if options.run is None:
        model = (
            DeepseekV3MTP(
                ModelConfig(**load_config(CONFIG).model.model_dump() | RANDOM_MODEL), MTPConfig()
            )
            .requires_grad_(False)
            .eval()
        )
        model.init_weights(0)
        generator = torch.Generator().manual_seed(0)
        prompt = torch.randint(
            model.config.vocab_size, (options.prompt_tokens,), generator=generator
        ).tolist()
        name = "random weights (nearly every draft is rejected)"
    else:
        from dsv3_mtp.data.tokenizer import recorded_encoder
        from dsv3_mtp.runs.model import load_model

        run = load_model(options.run)
        if run.tokenizer is None:
            raise ValueError(f"{options.run}: the run's data has no tokenizer.json here")
        model, name = run.model, str(options.run)
        prompt = (
            recorded_encoder(run.tokenizer, model.config.vocab_size)
            .tokenizer.encode(options.prompt, add_special_tokens=False)
            .ids
        )
    longest = model.config.max_position_embeddings
    if not 0 < len(prompt) <= longest - options.new_tokens:
        raise ValueError(
            f"{len(prompt):,} tokens of prompt, --new-tokens {options.new_tokens:,}: must be 1 "
            f"or more, and together at most model.max_position_embeddings = {longest:,}"
        )
    size = model_size(model, 1)
    return (
        model,
        prompt,
        f"{name}: {size.total / 1e6:.2f}M parameters, MTP {model.mtp_config.mode} D={model.depths}",
    )


def make_variants(
    model: Any, prompt: list[int], options: argparse.Namespace
) -> dict[str, Callable[[], Any]]:
    """Name -> a function that generates; those of this project return a Generation, transformers' a
    list of tokens.
    """
    from dsv3_mtp.decode.generate import Settings, generate

    def ours(**settings: Any) -> Callable[[], Any]:
        use = Settings(max_new_tokens=options.new_tokens, **settings)
        return lambda: generate(model, [prompt], use)

    variants = {"transformers generate()": transformers_generate(model, prompt, options.new_tokens)}
    if options.hf_mtp is not None:
        variants["transformers use_mtp=True"] = transformers_mtp(
            options.hf_mtp, model, prompt, options.new_tokens
        )
    variants["plain"] = ours()
    if model.depths:
        from dsv3_mtp.decode.draft import draft_limit

        depths = [k for k in options.depths if draft_limit(model, k) == k]
        variants |= {f"K={k}": ours(draft_depth=k) for k in depths}
        if 1 in depths:
            variants["K=1, int8"] = ours(draft_depth=1, draft_dtype="int8")
        most = max(depths, default=1)
        for p in options.thresholds:
            variants[f"K={most}, P={p:g}"] = ours(draft_depth=most, draft_threshold=p)
    if options.compile:
        variants["plain, compiled"] = ours(compile=True)
        if model.depths:
            variants["K=1, compiled"] = ours(compile=True, draft_depth=1)
    return variants


def transformers_generate(model: Any, prompt: list[int], count: int) -> Callable[[], list[int]]:
    """transformers' DeepseekV3ForCausalLM with this model's weights, in its default settings."""
    import torch

    from dsv3_mtp.hf.settings import to_config_json

    try:
        import transformers
    except ImportError:
        raise ValueError("transformers is not installed; pip install 'dsv3_mtp[hf]'") from None
    check_transformers(model.config.model_dump(), "transformers' generate()")
    content = to_config_json(model.config, 0, dtype="fp32", special_ids={})
    config = transformers.DeepseekV3Config.from_dict(content)
    theirs = transformers.DeepseekV3ForCausalLM(config).to(model.lm_head.weight.dtype).eval()
    state = {
        name: value for name, value in model.state_dict().items() if not name.startswith("mtp.")
    }
    theirs.load_state_dict(state, strict=True)
    return lambda: hf_generate(theirs, torch.tensor([prompt]), count)


def transformers_mtp(
    folder: str, model: Any, prompt: list[int], count: int
) -> Callable[[], list[int]]:
    """transformers' own self-speculative decoding on an exported folder (`dsv3 export`) of
    this model.
    """
    import torch
    import transformers

    from dsv3_mtp.hf.settings import read_settings

    settings = read_settings(Path(folder))  # a folder that is missing would be asked for on the hub
    if settings.model != model.config or not settings.modules:
        raise ValueError(
            f"--hf-mtp {folder}: needs this model with its "
            "MTP modules; export it with `dsv3 export`"
        )
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    layers, modules = theirs.config.num_hidden_layers, theirs.config.num_nextn_predict_layers
    # transformers 5.23 finds MTP weights by a pattern that names DeepSeek-V3's layer 61.
    theirs._keys_to_ignore_on_load_unexpected = [
        rf"model\.layers\.{layers + k}\..*" for k in range(modules)
    ]
    return lambda: hf_generate(theirs, torch.tensor([prompt]), count, use_mtp=True)


def hf_generate(theirs: Any, tokens: Any, count: int, **more: Any) -> list[int]:
    out = theirs.generate(
        tokens, max_new_tokens=count, do_sample=False, pad_token_id=0, eos_token_id=None, **more
    )
    return out[0, tokens.shape[1] :].tolist()


def report(
    variants: dict[str, Callable[[], Any]],
    seconds: dict[str, list[float]],
    options: argparse.Namespace,
) -> str:
    names = f"{'us/token':>10}{'tokens/cpu-s':>14}{'x transformers':>16}{'x plain':>9}"
    rows = [f"{'':28}{names}{'tokens/step':>13}  acceptance"]
    outputs = {name: run() for name, run in variants.items()}
    expected = outputs["plain"].tokens[0]
    for name, times in seconds.items():
        out = outputs[name]
        per_token = statistics.median(times) / options.new_tokens
        ratios = [
            statistics.median(base / own for base, own in zip(seconds[against], times, strict=True))
            for against in ("transformers generate()", "plain")
        ]
        row = f"{name:28}{per_token * 1e6:>10.0f}{1 / per_token:>14.0f}"
        row += f"{ratios[0]:>16.2f}{ratios[1]:>9.2f}"
        if hasattr(out, "acceptance"):
            joint = " ".join(f"{p:.2f}" for p in out.acceptance.joint)
            row += f"{out.acceptance.tokens_per_step:>13.2f}  {joint}"
            out = out.tokens[0]
        rows.append(row if out == expected else f"{row}  OTHER TOKENS")
    return "\n".join(rows)


if __name__ == "__main__":
    sys.exit(main())
