"""What a resumed run tells: the settings and the code that changed, and what follows from that."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dsv3_mtp.config import Config, schedules
from dsv3_mtp.runs.folder import changed_code, changed_settings


def resume_notes(config: Config, saved: Mapping[str, Any], folder: Path, here: str) -> list[str]:
    """Notes of a run that goes on from the checkpoint `folder` of state `saved`; the first says
    where. here: the layout of ranks in words.

    Raises:
        ValueError: a setting was changed that a checkpoint does not allow to change.
    """
    moved = f", a checkpoint of {saved['layout']}, on {here}" if saved["layout"] != here else ""
    finished = saved["tokens"] >= config.train.total_tokens
    return [
        f"resumed at step {saved['step']} from {folder}{moved}",
        *changed_settings(saved["config"], config, folder, finished=finished),
        *_warmed_again(config, saved),
        *changed_code(config),
    ]


def _warmed_again(config: Config, saved: Mapping[str, Any]) -> list[str]:
    """A longer train.total_tokens moves the progress back, and with it the schedules."""
    before, total = saved["config"]["train"]["total_tokens"], config.train.total_tokens
    if total == before:
        return []
    tokens = saved["tokens"]
    old, new = (min(tokens / length, 1.0) for length in (before, total))
    rates = [schedules.learning_rate(config.optim, progress) for progress in (old, new)]
    text = f"progress goes from {old:.0%} to {new:.0%}, the learning rate from {rates[0]:.2e}"
    again = ": it is warmed again" if rates[1] > 1.01 * rates[0] else ""
    return [f"train.total_tokens: {text} to {rates[1]:.2e}{again}"]


def resumed_lambda(config: Config, saved: Mapping[str, Any], first: Any) -> tuple[Any, list[str]]:
    """The state of lambda's schedule, and notes. first: of a fresh run; a schedule of another type
    than the saved one begins with it.
    """
    if first is None:
        return None, []
    before = saved["config"]["mtp"]["loss_weight"]["type"]
    if saved.get("loss_weight") is None or before != config.mtp.loss_weight.type:
        return first, ["mtp.loss_weight: of another type than before, begins with its first state"]
    return saved["loss_weight"], []
