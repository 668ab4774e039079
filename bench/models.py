"""The models of tools/bench.py and bench_decode.py, in configs/v3_tiny.yaml's place, and what is
not compared.
"""

from typing import Any

TINY = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 704,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "q_lora_rank": 96,
    "kv_lora_rank": 64,
    "initializer_range": 0.02,
}
SMALL = TINY | {
    "vocab_size": 8192,
    "hidden_size": 384,
    "intermediate_size": 1056,
    "moe_intermediate_size": 160,
    "num_hidden_layers": 7,
    "q_lora_rank": 128,
    "kv_lora_rank": 96,
}


def check_transformers(model: dict[str, Any], what: str) -> None:
    """Raises ValueError, which begins with `what`, where transformers computes something else from
    these settings.
    """
    from dsv3_mtp.config import ModelConfig, MTPConfig
    from dsv3_mtp.hf.settings import representable

    try:
        _, differences = representable(
            ModelConfig.model_validate(model), MTPConfig(mode="none"), trunk_only=True
        )
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from None
    if differences:
        raise ValueError(f"{what}: model.{differences[0]}; leave the default")
