"""Training, generation and evaluation from Python: the names that `dsv3_mtp` exports.

    config = load_config("configs/v3_nano.yaml").replace("mtp.loss_weight", 0.1)
    run = train_run(config)
    run.generate("def ", speculative=True)
    run.evaluate()["val/main_loss"], run.metrics["train/main_loss"]

Nothing here has an effect on the process that outlives the call: no signal handler, no environment
variable, no seed, no number of threads. That has a price: Ctrl-C in `train_run` goes back to the
last checkpoint, where `dsv3 train` saves first; and on a CPU `dsv3 train` also turns on faster
products, which round otherwise.
"""

import gc
import warnings
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from dsv3_mtp.config import Config
from dsv3_mtp.data.opening import validation_source
from dsv3_mtp.data.tokenizer import DocumentEncoder, recorded_encoder
from dsv3_mtp.decode.draft import draft_limit
from dsv3_mtp.decode.generate import Settings, generate
from dsv3_mtp.files.run_folder import run_config
from dsv3_mtp.hf.load import load_hf as load_hf_model
from dsv3_mtp.model.causal_lm import DeepseekV3MTP
from dsv3_mtp.report.metrics import read_metrics
from dsv3_mtp.runs.folder import run_folder
from dsv3_mtp.runs.model import load_model

if TYPE_CHECKING:
    import pyarrow


class LanguageModel:
    """A model in eval mode and the tokenizer that its text goes through.

    tokenizer: path of tokenizer.json; None: there is none, and `generate` cannot be used.
    """

    def __init__(self, model: DeepseekV3MTP, tokenizer: Path | None) -> None:
        self.model, self.tokenizer = model, tokenizer

    @cached_property
    def encoder(self) -> DocumentEncoder:
        if self.tokenizer is None:
            raise ValueError("there is no tokenizer.json beside these weights or their data")
        return recorded_encoder(self.tokenizer, self.model.config.vocab_size)

    def generate(
        self,
        prompt: str,
        *,
        max_new_tokens: int = 128,
        speculative: bool = False,
        draft_depth: int | None = None,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> str:
        """The text that follows the prompt, to the end-of-text token or max_new_tokens.

        Args:
            speculative: draft with the MTP heads; the text is that of plain decoding.
            draft_depth: drafts per step; None: the model's D.
            temperature: 0 is greedy.
            seed: of sampling.

        Raises:
            ValueError: there is no tokenizer, the prompt is empty or too long, a setting is out of
                bounds or has no effect, or the model has no heads to draft with.
        """
        if draft_depth is not None and not speculative:
            raise ValueError("draft_depth goes with speculative=True")
        depth = 0
        if speculative:
            depth = draft_limit(self.model, draft_depth or max(self.model.depths, 1))
        settings = Settings(
            max_new_tokens=max_new_tokens,
            draft_depth=depth,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            stop_tokens=(self.encoder.eos_id,),
            seed=seed,
        )
        tokenizer = self.encoder.tokenizer
        ids = tokenizer.encode(prompt, add_special_tokens=False).ids
        (tokens,) = generate(self.model, [ids], settings).tokens
        return tokenizer.decode(tokens, skip_special_tokens=True)


class Run(LanguageModel):
    """A run folder: its config, metrics, and the model of its newest checkpoint, which is loaded
    when it is first asked for.

    Raises:
        ValueError: the folder is no run, or, once the model is asked for, it has no checkpoint.
    """

    def __init__(self, folder: str | Path, *, trust_code: bool = False) -> None:
        self.folder, self.trust_code = Path(folder), trust_code
        if not (self.folder / "config.yaml").is_file():
            raise ValueError(f"{folder}: no config.yaml there; name the folder of a run")
        self.config = run_config(self.folder, trust_code=trust_code)

    @cached_property
    def _loaded(self) -> tuple[DeepseekV3MTP, Path | None]:
        loaded = load_model(self.folder, trust_code=self.trust_code)
        for note in loaded.notes:
            warnings.warn(note, stacklevel=3)
        return loaded.model, loaded.tokenizer

    @property
    def model(self) -> DeepseekV3MTP:  # type: ignore[override]
        """On the CPU; `run.model.to("cuda")` moves it."""
        return self._loaded[0]

    @property
    def tokenizer(self) -> Path | None:  # type: ignore[override]
        return self._loaded[1]

    @property
    def metrics(self) -> "pyarrow.Table":
        """metrics.jsonl as a table: a row per logged step or validation, a column per metric
        (docs/metrics.md), null where a row has none. `run.metrics.to_pandas()` where pandas is
        installed.
        """
        import pyarrow

        records = read_metrics(self.folder / "metrics.jsonl")
        names = dict.fromkeys(name for record in records for name in record)
        return pyarrow.table({name: [r.get(name) for r in records] for name in names})

    def evaluate(
        self, *, batches: int | None = None, prompts: int = 8, temperature: float = 0.0
    ) -> dict[str, float]:
        """What `dsv3 evaluate --run` prints for the validation data of the run, by name
        (docs/metrics.md). What a reader should know about the numbers is a warning.

        Args:
            batches: micro-batches of the validation; None: `eval.batches`.
            prompts: for free-running acceptance; 0: it is not measured.
            temperature: of acceptance.

        Raises:
            ValueError: the validation data is not there or of another vocabulary.
        """
        from dsv3_mtp.train.evaluation import evaluation
        from dsv3_mtp.train.floors import readable_training

        source = validation_source(self.config)
        trained, notes = readable_training(self.folder, trust_code=self.trust_code)
        metrics, more = evaluation(
            self.model,
            source,
            self.config,
            batches=batches or self.config.eval.batches,
            device=next(self.model.parameters()).device,
            trained=trained,
            prompts=prompts,
            temperature=temperature,
        )
        for note in [*notes, *more]:
            warnings.warn(f"{source.path}: {note}", stacklevel=2)
        return metrics


def train_run(config: Config) -> Run:
    """Trains a run to its end in this process, or goes on with it from its last checkpoint; one
    device. Several need a launcher and `dsv3 train`.

    Raises:
        ValueError: the config does not fit the data, or what is in the run folder.
        NonFiniteError: a loss or gradient is nan or infinite (dsv3_mtp.train.trainer).
    """
    from dsv3_mtp.train.trainer import Trainer

    threads = torch.get_num_threads()
    with torch.random.fork_rng():
        try:
            trainer = Trainer(config, command=["dsv3_mtp.train_run(config)"])
            try:
                trainer.run()
            finally:
                trainer.release()
        finally:
            torch.set_num_threads(threads)
    del trainer
    gc.collect()  # DeepSpeed's engine holds itself, and with it weights, gradients and moments
    return Run(run_folder(config), trust_code=True)  # the caller's own config named the code


def load_run(folder: str | Path, *, trust_code: bool = False) -> Run:
    """The run in a folder, like runs/v3_tiny.

    trust_code: import what its config names as package.module:Class.

    Raises:
        ValueError: the folder is no run.
    """
    return Run(folder, trust_code=trust_code)


def load_hf(folder: str | Path) -> LanguageModel:
    """A checkpoint in DeepSeek-V3's layout (config.json, *.safetensors, tokenizer.json), with its
    MTP modules, on the CPU.

    Raises:
        ValueError: it is of another architecture, damaged or incomplete.
    """
    return LanguageModel(*load_hf_model(folder))
