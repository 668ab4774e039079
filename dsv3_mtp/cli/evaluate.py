"""Evaluate a run, or any checkpoint in DeepSeek-V3's layout, on prepared data and on tasks.

    dsv3 evaluate --run runs/v3_tiny
    dsv3 evaluate --hf hf/v3_tiny --data data/pystdlib-2048 data/web --batches 64
    dsv3 evaluate --run runs/v3_tiny --lm-eval lambada_openai,hellaswag --limit 100

Of a run on a generated task (data.task) also what it gets right: exact match of the generated
answers. Per depth: loss (nats per token), top1 (argmax equals the text), agreement (argmax equals
the main model's own along the text), overlap (what a sampled draft is accepted with, along the
text), bits per byte of the main head; acceptance of free-running drafts. Depth 0 is the main head.

Beside the numbers of a text stand its floors, which need no network: n-gram tables, counted from
the tokens that the run was trained on (val/floor/unigram and so on), and drafters that are a
constant distribution or a table of tokens (val/floor/overlap/constant, val/floor/overlap/table).
--drafts says how drafts differ from the main model: KL, top-k coverage, calibration, what a
threshold (p-min) keeps; with a --draft-depth beyond D also the overlap of recycled modules.

Exit codes: 0 done, 2 the model, the data or a task cannot be used.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from dsv3_mtp.cli.command import MOST_WINDOWS, add_run_options, add_window_options, at_least
from dsv3_mtp.cli.drafting import OPTIONS, add_draft_options, draft_depth, draft_settings

# What `check` compares with the given options.
DEFAULTS = {"split": "val", "prompts": 8, "drafts": False}
LOSSES_ONLY = (
    *("data", "split", "batches", "seq_len", "prompts", "new_tokens", "temperature", "drafts"),
    *OPTIONS,
)
TASKS_ONLY = ("lm_eval_include", "limit")


def add_options(parser: argparse.ArgumentParser) -> None:
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--run", metavar="RUN", help="run folder: its newest checkpoint")
    what.add_argument("--hf", metavar="DIR", help="folder with config.json and *.safetensors")
    add, windows = parser.add_argument, at_least(1, MOST_WINDOWS)
    text = "prepared folders or Megatron prefixes (default: what the run is validated on)"
    add("--data", nargs="+", metavar="DIR", help=text)
    text = " (default: the run's eval.batches, as in training; with --hf 16)"
    add_window_options(parser, split="of prepared folders", batches=text)
    add("--micro-batch-size", type=windows, metavar="N", help="sequences per forward")
    add("--seq-len", type=at_least(1), metavar="T", help="tokens per window")
    text = "prompts for acceptance; 0: leave it out (default: 8)"
    add("--prompts", type=at_least(0, MOST_WINDOWS), default=8, metavar="N", help=text)
    text = "behind each prompt, of which the first and the last have no draft (default: 64, or half"
    add("--new-tokens", type=at_least(3), metavar="N", help=f"{text} of what the model can read)")
    text = "of acceptance and of --drafts (default: acceptance is greedy, --drafts at 1)"
    add("--temperature", type=float, metavar="T", help=text)
    add("--drafts", action="store_true", help="statistics of the drafts along the text as well")
    add_draft_options(parser)
    add_run_options(parser)
    add("--lm-eval", metavar="TASK,...", help="run tasks of lm-evaluation-harness instead")
    add("--lm-eval-include", metavar="DIR", help="folder with task YAMLs of your own")
    add("--limit", type=at_least(1), metavar="N", help="documents per task (default: all)")
    add("--json", action="store_true", help="print JSON")


def check(options: argparse.Namespace) -> str | None:
    if options.lm_eval is not None and not all(options.lm_eval.split(",")):
        return f"--lm-eval {options.lm_eval!r}: must name tasks, with commas between them"
    own = LOSSES_ONLY if options.lm_eval else TASKS_ONLY
    if unused := [key for key in own if getattr(options, key) != DEFAULTS.get(key)]:
        names = ", ".join("--" + key.replace("_", "-") for key in unused)
        return f"{names}: {'no effect with' if options.lm_eval else 'only with'} --lm-eval"
    if options.new_tokens is not None and not options.prompts:
        return "--new-tokens: no effect with --prompts 0"
    if options.temperature is not None and not 0.001 <= options.temperature <= 100:
        return f"--temperature {options.temperature}: must be in [0.001, 100]"
    if options.temperature is not None and not (options.prompts or options.drafts):
        return "--temperature: no effect with --prompts 0 and without --drafts"
    for key in ("draft_depth", "recycle", "draft_threshold", "draft_dtype"):
        drafts = options.drafts and key in ("draft_depth", "recycle")
        if getattr(options, key) is not None and not (options.prompts or drafts):
            return f"--{key.replace('_', '-')}: no effect with --prompts 0"
    if options.draft_vocab is not None and not (options.prompts or options.drafts):
        return "--draft-vocab: no effect with --prompts 0 and without --drafts"
    if options.hf and not options.data and not options.lm_eval:
        return "--hf needs --data or --lm-eval: a checkpoint does not say what to evaluate on"
    if options.hf and options.ema:
        return "--ema goes with --run: an exported checkpoint holds one set of weights"
    return None


def run(options: argparse.Namespace) -> None:
    show(tasks(options) if options.lm_eval else losses(options), options.json)


def tasks(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Results of lm-evaluation-harness."""
    from dsv3_mtp.train.lm_eval import lm_eval

    where = {key: getattr(options, key) for key in ("run", "hf", "ema", "trust_code", "limit")}
    size = {"include": options.lm_eval_include, "batch_size": options.micro_batch_size or 1}
    return {"lm-eval": lm_eval(options.lm_eval.split(","), **where, **size)}


def losses(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Metrics of every data source."""
    import torch

    from dsv3_mtp.data.opening import validation_source
    from dsv3_mtp.ops.tuning import tune
    from dsv3_mtp.train.evaluation import evaluation
    from dsv3_mtp.train.floors import readable_training
    from dsv3_mtp.train.validation import open_model

    keys = ("run", "hf", "seq_len", "micro_batch_size", "ema", "trust_code")
    model, config = open_model(**{key: getattr(options, key) for key in keys})
    sources = opened(options, config)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tune(device)  # as in training: the same bits
    model.to(device)
    lost: list[str] = []
    trained = None
    if options.run:
        trained, lost = readable_training(options.run, trust_code=options.trust_code)
    if options.drafts and not config.mtp.depths:
        raise ValueError("--drafts: the model has no MTP heads (mtp.mode: none)")
    if not config.mtp.depths and (given := [key for key in OPTIONS if getattr(options, key)]):
        names = ", ".join(f"--{key.replace('_', '-')}" for key in given)
        raise ValueError(f"{names}: the model has no MTP heads to draft with")
    how: dict[str, Any] = {"batches": options.batches or config.eval.batches, "device": device}
    how |= {"trained": trained, "drafting": draft_settings(options, config)}
    if options.draft_depth or options.recycle:
        how["draft_depth"] = draft_depth(options, model)
        if not options.prompts and how["draft_depth"] <= config.mtp.drafts:
            text = f"no effect on --drafts up to D = {config.mtp.drafts}, all of which are measured"
            raise ValueError(f"--draft-depth {how['draft_depth']}: {text}")
    for key in ("prompts", "new_tokens", "temperature", "drafts"):
        how[key] = getattr(options, key)
    results = {}
    for source in sources or [validation_source(config, options.split)]:
        metrics, notes = evaluation(model, source, config, **how)
        for note in [*notes, *(lost if source.text is not None else [])]:
            print(f"{source.path}: {note}", file=sys.stderr)
        results[source.path] = metrics
    return results


def opened(options: argparse.Namespace, config: Any) -> list[Any]:
    """The sources that --data names. Raises ValueError: they or --new-tokens do not fit."""
    from dsv3_mtp.data.source import check_tokenizers, check_vocab, open_source, tokenizer_sha256
    from dsv3_mtp.files.run_folder import tokenizer_of

    longest, new_tokens = config.model.max_position_embeddings, options.new_tokens
    task = config.data.task
    if new_tokens is not None and new_tokens >= longest:
        text = f"must be < model.max_position_embeddings = {longest}"
        raise ValueError(f"--new-tokens {new_tokens}: {text}")
    if new_tokens is not None and task is not None and task.has_answers and not options.data:
        text = f"no effect on data.task {task.type}, whose answers have a length of their own"
        raise ValueError(f"--new-tokens: {text}")
    sources: list = [open_source(path, options.split) for path in options.data or []]
    tokenizer: Path | None = Path(options.hf or "", "tokenizer.json")
    if options.run:
        tokenizer = tokenizer_of(config, Path(options.run))
    own = (options.run or options.hf, tokenizer_sha256(tokenizer))
    for source in sources:
        check_vocab(source, config.model.vocab_size)
        check_tokenizers([own, (source.path, source.tokenizer_sha256)])
    return sources


def show(results: dict[str, dict[str, float]], as_json: bool) -> None:
    if as_json:
        print(json.dumps(results, indent=1))
        return
    for source, metrics in results.items():
        width = max(map(len, metrics), default=0)
        lines = [f"  {name:{width}}  {value:.4f}" for name, value in metrics.items()]
        print("\n".join([source, *lines]))
