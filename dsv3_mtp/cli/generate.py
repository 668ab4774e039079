"""Text from a trained model, plain or by lossless self-speculative decoding with its MTP heads.

    dsv3 generate --run runs/v3_tiny --prompt 'def ' --speculative --show-drafts
    dsv3 generate --run runs/v3_tiny --prompt 'import ' --prompt 'class ' --temperature 0.8
    dsv3 generate --hf hf/v3_tiny --prompt-file prompt.py --speculative --draft-depth 3

The continuation goes to stdout, in a terminal after its prompt; one line of numbers to stderr. Exit
codes: 0 done, 2 wrong options, prompt or checkpoint.
"""

import argparse
import sys
import time
from typing import Any

from dsv3_mtp.cli.command import add_run_options, at_least
from dsv3_mtp.cli.drafting import OPTIONS, add_draft_options, draft_depth, draft_settings
from dsv3_mtp.cli.printer import Printer, marks
from dsv3_mtp.cli.prompts import read_prompts

INTERRUPTED = "\ninterrupted"


def add_options(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group(required=True)
    text = "run folder, like runs/v3_tiny: its newest complete checkpoint"
    source.add_argument("--run", metavar="DIR", help=text)
    source.add_argument("--hf", metavar="DIR", help="checkpoint in DeepSeek-V3's layout")
    add_run_options(parser)
    title = "prompts (each option repeats: a batch; without any, stdin is the prompt)"
    _add_prompts(parser.add_argument_group(title))
    _add_choice(parser.add_argument_group("choice of tokens"))
    drafts = parser.add_argument_group("self-speculative decoding")
    text = "draft with the MTP heads; the output stays the same"
    drafts.add_argument("--speculative", action="store_true", help=text)
    add_draft_options(drafts)
    text = "mark accepted drafts: green in a terminal, « » elsewhere"
    drafts.add_argument("--show-drafts", action="store_true", help=text)
    add = parser.add_argument
    add("--device", metavar="NAME", help="default: cuda if there is one, else cpu")
    add("--threads", type=at_least(1, 1024), metavar="N", help="CPU threads")
    add("--compile", action="store_true", help="torch.compile: minutes once, then faster")


def _add_prompts(group: Any) -> None:
    add, many = group.add_argument, {"action": "append", "default": []}
    add("--prompt", **many, metavar="TEXT")
    add("--prompt-file", **many, metavar="FILE", help="a whole file is one prompt")
    add("--prompt-ids", **many, metavar="IDS", help="token ids, like '5 9 3'")


def _add_choice(group: Any) -> None:
    add = group.add_argument
    add("--max-new-tokens", type=int, default=128, metavar="N", help="default: 128")
    add("--temperature", type=float, default=0.0, metavar="X", help="default: 0, greedy")
    add("--top-k", type=int, metavar="K", help="only the K most likely tokens")
    add("--top-p", type=float, default=1.0, metavar="P", help="only the likeliest tokens up to P")
    add("--seed", type=int, default=0, help="of sampling (default: 0)")
    text = "stop after this token: text or id"
    add("--stop", action="append", default=[], metavar="TOKEN", help=text)
    add("--ignore-eos", action="store_true", help="go on behind the end-of-text token")


def check(options: argparse.Namespace) -> str | None:
    own = (*OPTIONS, "show_drafts")
    given = [key.replace("_", "-") for key in own if getattr(options, key) not in (None, False)]
    if not options.speculative and given:
        return f"{', '.join(f'--{name}' for name in given)}: only with --speculative"
    if options.hf and options.ema:
        return "--ema goes with --run: an exported checkpoint holds one set of weights"
    return None


def run(options: argparse.Namespace) -> None:
    import torch

    from dsv3_mtp.decode.generation import repetition

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    model, config, encoder = load(options)
    names, prompts = read_prompts(options, encoder, model.config.max_position_embeddings)
    settings = settings_of(options, model, config, encoder)
    result, seconds = timed(model, prompts, settings, encoder=encoder, names=names, options=options)
    longest = model.config.max_position_embeddings
    for name, prompt, tokens in zip(names, prompts, result.tokens, strict=True):
        if len(prompt) + len(tokens) == longest and len(tokens) < settings.max_new_tokens:
            note = f"note: {name} ends where the model does, after {longest} tokens"
            print(note, file=sys.stderr)
    if legend := marks(drafts=options.show_drafts).legend:
        print(legend, file=sys.stderr)
    is_text = encoder is not None and (config is None or config.data.task is None)
    if is_text and (warning := repetition(result.distinct)):
        print(f"note: {warning}", file=sys.stderr)
    print(summary(model, prompts, settings, result, seconds), file=sys.stderr)


def load(options: argparse.Namespace) -> tuple[Any, Any, Any]:
    """The model on its device, its config (None: no run) and its tokenizer (None: none there)."""
    import torch

    from dsv3_mtp.data.tokenizer import recorded_encoder

    if options.run is not None:
        from dsv3_mtp.runs.model import load_model

        run = load_model(options.run, ema=options.ema, trust_code=options.trust_code)
        for note in run.notes:
            print(f"note: {note}", file=sys.stderr)
        model, config, tokenizer = run.model, run.config, run.tokenizer
    else:
        from dsv3_mtp.hf import load_hf

        (model, tokenizer), config = load_hf(options.hf), None
    name = options.device
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "meta":
            raise RuntimeError("holds no values; choose cpu or cuda")
        model = model.to(device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}") from None
    if tokenizer is None:
        return model, config, None
    return model, config, recorded_encoder(tokenizer, model.config.vocab_size)


def settings_of(options: argparse.Namespace, model: Any, config: Any, encoder: Any) -> Any:
    from dsv3_mtp.decode.generate import Settings

    stops = [] if options.ignore_eos or encoder is None else [encoder.eos_id]
    for name in options.stop:
        known = None if encoder is None else encoder.tokenizer.token_to_id(name)
        if known is None and encoder is not None:
            ids = encoder.tokenizer.encode(name, add_special_tokens=False).ids
            known = ids[0] if len(ids) == 1 else None
        if known is None and not (name.isdecimal() and int(name) < model.config.vocab_size):
            raise ValueError(f"--stop {name!r}: not one token of the vocabulary, nor an id")
        stops.append(int(name) if known is None else known)
    depth = draft_depth(options, model) if options.speculative else 0
    return Settings(
        max_new_tokens=options.max_new_tokens,
        draft_depth=depth,
        **draft_settings(options, config),
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        stop_tokens=tuple(stops),
        seed=options.seed,
        compile=options.compile,
    )


def timed(
    model: Any, prompts: list[list[int]], settings: Any, *, encoder: Any, names: Any, options: Any
) -> Any:
    """Generates and prints, a single prompt as it comes; returns result and seconds."""
    from dsv3_mtp.decode.generate import Acceptance, Generation, stream

    printers = [Printer(encoder, marks(drafts=options.show_drafts)) for _ in prompts]
    texts, started = [""] * len(prompts), None
    result = Generation([[] for _ in prompts], Acceptance())
    steps = stream(model, prompts, settings)
    if len(prompts) == 1 and names != ["stdin"]:
        print(printers[0].opening(prompts[0]), end="", flush=True)
    for step in steps:
        started = started or time.perf_counter()  # the first token ends the (first) prefill
        result.add(step)
        piece = printers[step.row].push(step.tokens, step.accepted, done=step.done)
        if len(prompts) == 1:
            print(piece, end="", flush=True)
        texts[step.row] += piece
    seconds = time.perf_counter() - (started or 0.0)
    if len(prompts) == 1:
        print(flush=True)
    else:
        for name, text in zip(names, texts, strict=True):
            print(f"--- {name}\n{text}", flush=True)
    return result, seconds


def summary(
    model: Any, prompts: list[list[int]], settings: Any, result: Any, seconds: float
) -> str:
    """Speed, tokens per trunk forward, acceptance by position, speed-up over plain decoding."""
    from dataclasses import replace

    from dsv3_mtp.decode.generate import generate

    total, decoded = sum(map(len, result.tokens)), result.acceptance.tokens
    if not decoded:
        return f"{total} tokens, all from the prefill"
    if settings.compile:  # the first time was spent on compiling
        start = time.perf_counter()
        generate(model, prompts, settings)
        seconds = time.perf_counter() - start
    parts = [f"{total} tokens", f"{decoded / seconds:,.1f} tokens/s"]
    if settings.draft_depth:
        acceptance = result.acceptance
        parts.append(f"{acceptance.tokens_per_step:.2f} tokens per trunk forward")
        parts.append(f"{sum(acceptance.kept)} of {sum(acceptance.tried)} drafts accepted")
        shares = (acceptance.joint, acceptance.conditional)
        joint, conditional = (" ".join(f"{p:.3f}" for p in part) for part in shares)
        if len(acceptance.tried) > 1:
            parts[-1] += f" (by position {joint} joint, {conditional} conditional)"
        plain_settings = replace(settings, draft_depth=0)
        times = {0: 0.0, settings.draft_depth: 0.0}
        plain = generate(model, prompts, plain_settings)
        for use in (settings, plain_settings):  # both again, without printing, warm
            start = time.perf_counter()
            tokens = sum(map(len, generate(model, prompts, use).tokens))
            times[use.draft_depth] = (time.perf_counter() - start) / tokens
        parts.append(f"{times[0] / times[settings.draft_depth]:.2f}x plain decoding")
        if settings.temperature == 0:
            same = plain.tokens == result.tokens
            parts.append("same tokens" if same else "tokens differ: rounding at a near-tie")
    return ", ".join(parts)
