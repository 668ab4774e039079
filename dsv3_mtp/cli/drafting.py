"""Options that say how drafts are made, the same for every command that drafts."""

import argparse
import sys
from pathlib import Path
from typing import Any

from dsv3_mtp.cli.command import at_least

# what `add_draft_options` adds
OPTIONS = "draft_depth", "recycle", "draft_threshold", "draft_vocab", "draft_dtype"


def share(text: str) -> float:
    """A `type` for argparse: a number in [0, 1]."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text}: must be a number") from None
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text}: must be in [0, 1]")
    return value


def add_draft_options(group: Any) -> None:
    """group: a parser or a group of one."""
    add, number = group.add_argument, at_least(1)
    text = "drafts per step (default: the model's D)"
    add("--draft-depth", type=number, metavar="K", help=text)
    text = (
        "what drafts beyond D: the last module at the next slots (as SGLang; vLLM at D = 1), "
        "or modules 1..D again at the same slot (as vLLM at D > 1) (default: last)"
    )
    add("--recycle", choices=("last", "cycle"), help=text)
    text = "draft no further where the draft's top probability, or the head's confidence, is below"
    add("--draft-threshold", type=share, metavar="P", help=f"{text} P (default: 0)")
    text = "of a run: draft among the N most frequent tokens of its training text (default: all)"
    add("--draft-vocab", type=number, metavar="N", help=text)
    text = "on a CPU: read the weights that drafts alone need in int8 (default: the model's dtype)"
    add("--draft-dtype", choices=("int8",), help=text)


def draft_depth(options: argparse.Namespace, model: Any) -> int:
    """Drafts per step; says so where the heads make fewer than --draft-depth. Raises ValueError: so
    many drafts never fit, or none is made by a module that is used again, and --recycle says by
    which.
    """
    from dsv3_mtp.decode.draft import draft_limit

    own = max(model.mtp_config.drafts, 1)
    depth = options.draft_depth or own
    if depth >= (longest := model.config.max_position_embeddings):
        text = f"must be < model.max_position_embeddings = {longest}"
        raise ValueError(f"--draft-depth {depth}: {text}")
    limit = draft_limit(model, depth)
    if options.recycle and limit <= own:
        raise ValueError(
            f"--recycle {options.recycle}: no effect on {limit} drafts of "
            f"{model.mtp_config.mode} heads of D = {model.depths}, which use no module twice; "
            + ("give a larger --draft-depth" if draft_limit(model, own + 1) > own else "drop it")
        )
    if 0 < limit < depth:
        heads = f"{model.depths} independent heads, which draft at most {limit} tokens"
        note = f"--draft-depth {depth} drafts {limit}: the model has {heads}"
        print(f"note: {note}", file=sys.stderr)
        return limit
    return depth


def draft_settings(options: argparse.Namespace, config: Any) -> dict[str, Any]:
    """Those options as fields of `decode.generate.Settings`. config: of the run, None: no run.

    Raises:
        ValueError: --draft-vocab without a run, or one that the run's training text does not give.
    """
    settings: dict[str, Any] = {"recycle": options.recycle} if options.recycle else {}
    if options.draft_threshold is not None:
        settings["draft_threshold"] = options.draft_threshold
    if options.draft_dtype is not None:
        settings["draft_dtype"] = options.draft_dtype
    if options.draft_vocab is not None:
        if options.run is None:
            raise ValueError(
                "--draft-vocab goes with --run: a folder in DeepSeek-V3's layout does not say how "
                "frequent tokens were in its training text"
            )
        from dsv3_mtp.runs.frequencies import most_frequent

        try:
            ids = most_frequent(Path(options.run), config, options.draft_vocab)
        except ValueError as error:
            raise ValueError(f"--draft-vocab {options.draft_vocab}: {error}") from None
        settings["draft_vocab"] = ids
    return settings
