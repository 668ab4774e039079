"""The models of step.py and decode.py in place of that of configs/v3_tiny.yaml, and transformers as
it is compared with them.
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


def theirs(config: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """transformers as it comes, and tuned. On a GPU one row: what is tuned are settings of the CPU,
    and fused AdamW. On a CPU in bfloat16 both dtypes, against transformers as it comes, which is
    float32.
    """
    import torch

    if config["mtp"]["mode"] != "none":
        raise ValueError("--against transformers: it trains no MTP heads; add --set mtp.mode=none")
    check_transformers(config["model"], "--against transformers")

    def row(name: str, dtype: str, *, tuned: bool) -> tuple[str, dict[str, Any]]:
        changed = config | {"train": config["train"] | {"dtype": dtype}}
        return name, {"kind": "transformers", "config": changed, "tuned": tuned}

    own = config["train"]["dtype"]
    if torch.cuda.is_available():
        return [row("transformers", own, tuned=True)]
    rows = [row("transformers", "float32", tuned=False)]
    rows.append(row("transformers, tuned", "float32", tuned=True))
    if own != "float32":
        rows.append(row(f"transformers {own}, tuned", own, tuned=True))
    return rows


def valid(name: str, config: dict[str, Any]) -> dict[str, Any]:
    """The config of one variant; raises ConfigError with its name where the variant cannot have
    some other setting.
    """
    from pydantic import ValidationError

    from dsv3_mtp.config import Config, ConfigError
    from dsv3_mtp.config.reader import problems_of

    try:
        return Config.model_validate(config).to_dict()
    except ValidationError as error:
        raise ConfigError(name, problems_of(error, config, Config)) from None
