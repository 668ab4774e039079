"""DeepSeek-V3's multi-token prediction, trained with DeepSpeed, beside Meta's parallel heads.

The public names are loaded on first use, so that `import dsv3_mtp.config` stays free of torch.
docs/api.md describes them.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "load_config": "config",
    "Config": "config",
    "ConfigError": "config",
    "ModelConfig": "config",
    "MTPConfig": "config",
    # not `train`: importing dsv3_mtp.train would put the folder in its place
    "train_run": "api",
    "load_run": "api",
    "load_hf": "api",
    "Run": "api",
    "LanguageModel": "api",
    "load_study": "study.load",
    "run_study": "study.run",
    "report_study": "study.folder",
    "DeepseekV3MTP": "model.causal_lm",
    "MTPOutput": "model.output",
    "Trainer": "train.trainer",
    "Sampler": "data.sampler",
    "open_source": "data.source",
}
__all__ = list(_HOMES)

if TYPE_CHECKING:  # the same names, for type checkers and completion
    from dsv3_mtp.api import LanguageModel, Run, load_hf, load_run, train_run
    from dsv3_mtp.config import Config, ConfigError, ModelConfig, MTPConfig, load_config
    from dsv3_mtp.data.sampler import Sampler
    from dsv3_mtp.data.source import open_source
    from dsv3_mtp.model.causal_lm import DeepseekV3MTP
    from dsv3_mtp.model.output import MTPOutput
    from dsv3_mtp.study.folder import report_study
    from dsv3_mtp.study.load import load_study
    from dsv3_mtp.study.run import run_study
    from dsv3_mtp.train.trainer import Trainer


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
