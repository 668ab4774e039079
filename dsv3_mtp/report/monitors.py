"""TensorBoard and Weights & Biases: what a run sends to them beside its metrics.jsonl. No torch.

Both show every number of metrics.jsonl whose key has a "/" over the tokens consumed, which is
comparable between runs of other batch sizes.
"""

import importlib
import secrets
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from dsv3_mtp.config import Config, resume
from dsv3_mtp.files.atomic import write_text
from dsv3_mtp.report.metrics import Record

WANDB_ID = "wandb_id"  # file of a run folder: the id under which W&B knows the run


class Monitor(Protocol):
    def log(self, metrics: Record, tokens: int) -> None: ...

    def finish(self, table: Record) -> None:
        """table: the metrics of the last validation; empty if there was none."""


def open_monitors(config: Config, folder: Path, tokens: int) -> list[Monitor]:
    """Those that `config.log` asks for. tokens: consumed before this start; later points, which a
    kill left behind, are shown once only. Raises ValueError: W&B cannot be started.
    """
    found: list[Monitor] = []
    if config.log.tensorboard:
        found.append(TensorBoard(config, folder / "tb", tokens))
    if config.log.wandb is not None:
        found.append(Wandb(config, folder))
    return found


def flat(tree: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every setting; a list is one text, an empty mapping is left out."""
    for key, value in resume.flat(tree):
        if value != {}:
            plain = isinstance(value, str | bool | int | float)
            yield key, value if plain else str(value)


class TensorBoard:
    """Event files in `folder`: scalars over tokens, the config as text, and the HParams tab."""

    def __init__(self, config: Config, folder: Path, tokens: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.config = config
        self.writer: Any = SummaryWriter(str(folder), purge_step=tokens + 1 if tokens else None)
        code = textwrap.indent(config.to_yaml(), "    ")  # a code block of Markdown
        self.writer.add_text("config", code, tokens)

    def log(self, metrics: Record, tokens: int) -> None:
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, tokens)
        self.writer.flush()

    def finish(self, table: Record) -> None:
        from torch.utils.tensorboard.summary import hparams

        settings = dict(flat(self.config.to_dict()))
        for summary in hparams(settings, dict(table)) if table else ():
            self.writer.file_writer.add_summary(summary)
        self.writer.close()


class Wandb:
    """A run of W&B. Its id is kept in the run folder, so that a resumed run goes on there."""

    def __init__(self, config: Config, folder: Path) -> None:
        wandb: Any = importlib.import_module("wandb")
        settings, place = config.log.wandb, folder / WANDB_ID
        assert settings is not None
        if not place.exists():
            write_text(place, secrets.token_hex(8) + "\n")
        mtp = config.mtp
        tags = [mtp.mode, f"D={mtp.depths}", f"lambda {mtp.loss_weight.type}", *settings.tags]
        try:
            self.run = wandb.init(
                **{key: getattr(settings, key) for key in ("project", "entity", "group")},
                **{"name": config.run.name, "config": config.to_dict(), "tags": tags},
                **{"id": place.read_text().strip(), "resume": "allow", "dir": str(folder)},
                allow_val_change=True,  # of the config: a longer train.total_tokens on resume
            )
        except Exception as error:  # of wandb: no login, no network, a refused name
            raise ValueError(
                f"log.wandb: Weights & Biases cannot be started: {error}; log in with `wandb "
                "login`, set WANDB_MODE=offline, or log.wandb: null"
            ) from error
        self.run.define_metric("tokens")
        self.run.define_metric("*", step_metric="tokens")

    def log(self, metrics: Record, tokens: int) -> None:
        self.run.log({**metrics, "tokens": tokens})

    def finish(self, table: Record) -> None:
        self.run.summary.update(dict(table))
        self.run.finish()
