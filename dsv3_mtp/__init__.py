"""DeepSeek-V3's multi-token prediction, trained with DeepSpeed, beside Meta's parallel heads.

The public names are loaded on first use, so that `import dsv3_mtp.config` stays free of torch.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "Config": "config",
    "ConfigError": "config",
    "ModelConfig": "config",
    "MTPConfig": "config",
    "load_config": "config",
    "DeepseekV3MTP": "model.causal_lm",
    "MTPOutput": "model.output",
    "Sampler": "data.sampler",
    "open_source": "data.source",
    "Trainer": "train.trainer",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
