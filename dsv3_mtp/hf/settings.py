"""config.json of a checkpoint, to and from `model` and `mtp` of a run; what is refused."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import isfinite, log
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from dsv3_mtp.config import ModelConfig, MTPConfig
from dsv3_mtp.config.reader import problems_of
from dsv3_mtp.files.atomic import write_json
from dsv3_mtp.files.checked import read_json
from dsv3_mtp.hf.special import SPECIAL_IDS, special_problems
from dsv3_mtp.model.layers import yarn_mscale
from dsv3_mtp.precision.quantise import BLOCK

# Of a tensor that is not quantised, by the `dtype` of an export or import.
TYPES = {"bf16": torch.bfloat16, "fp8": torch.bfloat16, "fp32": torch.float32}
QUANTIZATION = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": list(BLOCK),
}
# What this code computes and has no key for: (value written, values accepted when read).
FIXED: dict[str, tuple[Any, tuple[Any, ...]]] = {
    # kimi_k2: the same model, so that engines can tell it (moonshotai/Kimi-K2, deploy_guidance)
    "model_type": ("deepseek_v3", ("deepseek_v3", "kimi_k2")),
    "hidden_act": ("silu", ("silu",)),
    "scoring_func": ("sigmoid", ("sigmoid",)),
    "topk_method": ("noaux_tc", ("noaux_tc",)),
    "moe_layer_freq": (1, (1,)),
    "attention_bias": (False, (False, None)),
    "tie_word_embeddings": (False, (False, None)),
}
READ_ONLY = {"rope_interleave": (True, None), "mtp_hidden_states_first": (False, None)}
# Without influence on what the weights compute.
UNUSED = {
    *("architectures", "auto_map", "torch_dtype", "dtype", "transformers_version", "use_cache"),
    *("_name_or_path", "bos_token_id", "eos_token_id", "pad_token_id", "attention_dropout"),
    *("pretraining_tp", "ep_size", "head_dim", "aux_loss_alpha", "seq_aux", "qk_head_dim"),
    *("output_router_logits", "num_key_value_heads", "quantization_config"),
    *("num_nextn_predict_layers", "num_mtp_layers", "rope_parameters", "return_dict"),
    *("output_hidden_states",),
}
YARN_PROBLEM = (
    "rope_scaling: mscale {mscale} with mscale_all_dim "
    "{mscale_all_dim} means different things to different readers; "
    "both must be > 0, or 1 and 0"
)
LATENT_EPS = 1e-6
# Our key, of an imported checkpoint whose MTP module was not trained as the released ones were.
TRUNK_HIDDEN, STATES = "dsv3_mtp_trunk_hidden", ("post_norm", "pre_norm")
MOST_MODULES = 64


@dataclass(frozen=True)
class HFSettings:
    """What a checkpoint's config.json says."""

    model: ModelConfig
    modules: int  # MTP modules stored
    block: tuple[int, int] | None  # of an FP8 checkpoint
    trunk_hidden: str  # what the first module was trained on: post_norm or pre_norm
    special_ids: dict[str, Any]  # bos_token_id, eos_token_id, pad_token_id as far as given
    notes: list[str]


def representable(model: ModelConfig, mtp: MTPConfig, *, trunk_only: bool) -> tuple[int, list[str]]:
    """MTP modules that an export of this run holds, and what the user should know about it.

    Raises:
        ValueError: DeepSeek-V3's layout has no place for something of this run; every reason is
            listed.
    """
    problems, notes = [], _latent_notes(model)
    if not model.n_shared_experts:
        problems.append(
            "model.n_shared_experts: 0: the layout has no MoE layer without shared experts"
        )
    if model.n_routed_experts == 1 and model.first_k_dense_replace < model.num_hidden_layers:
        problems.append(
            "model.n_routed_experts: 1: transformers scores a group of experts by its best two"
        )
    yarn = model.rope_scaling
    if yarn is not None and not _same_yarn(yarn.mscale, yarn.mscale_all_dim):
        problems.append("model." + YARN_PROBLEM.format(**yarn.model_dump()))
    if yarn is not None and not yarn.truncate:
        problems.append("model.rope_scaling.truncate: false: transformers alone knows it")
    heads = mtp.kind.export(model, mtp) if mtp.depths and not trunk_only else None
    problems += heads.problems if heads else []
    if problems:
        raise ValueError(
            "\n".join(["this run cannot be written in DeepSeek-V3's layout:", *problems])
        )
    if mtp.depths and trunk_only:
        which = f"the {mtp.depths} {mtp.mode} MTP head(s)"
        notes.append(f"not exported: {which}, as asked; the trunk is complete without them")
    return (heads.modules, notes + heads.notes) if heads else (0, notes)


def _latent_notes(model: ModelConfig) -> list[str]:
    if model.rms_norm_eps == LATENT_EPS:
        return []
    how = (
        "the latents are normed with it here, in vLLM and "
        f"SGLang, and with {LATENT_EPS:g} in transformers"
    )
    return [f"rms_norm_eps {model.rms_norm_eps:g}: {how}, whose results differ"]


def to_config_json(
    model: ModelConfig, modules: int, *, dtype: str, special_ids: dict[str, Any]
) -> dict[str, Any]:
    """The content of config.json with DeepSeek-V3's own keys. dtype: bf16, fp8 or fp32."""
    content: dict[str, Any] = {"architectures": ["DeepseekV3ForCausalLM"]}
    content |= {key: written for key, (written, _) in FIXED.items()}
    content |= model.model_dump(mode="json")
    if content["rope_scaling"] is not None:
        del content["rope_scaling"]["truncate"]  # true, which DeepSeek's files do not say
    content["num_key_value_heads"] = model.num_attention_heads
    content["num_nextn_predict_layers"] = modules
    content |= {
        "attention_dropout": 0.0,
        "use_cache": True,
        "torch_dtype": str(TYPES[dtype]).removeprefix("torch."),
    }
    content |= {key: special_ids.get(key) for key in SPECIAL_IDS[:2]}
    content |= {
        key: special_ids[key] for key in SPECIAL_IDS[2:] if special_ids.get(key) is not None
    }
    if dtype == "fp8":
        content["quantization_config"] = QUANTIZATION
    return dict(sorted(content.items()))


def write_settings(folder: Path, content: dict[str, Any]) -> None:
    """config.json, and generation_config.json unless the folder has one."""
    write_json(folder / "config.json", content)
    generation = folder / "generation_config.json"
    if not generation.exists():
        ids = {key: content[key] for key in SPECIAL_IDS if content.get(key) is not None}
        write_json(generation, {"_from_model_config": True, **ids, "do_sample": False})


def read_settings(folder: Path) -> HFSettings:
    """Reads config.json.

    Raises:
        ValueError: it is missing, or describes something that this code does not compute; all
            reasons are listed.
    """
    path = folder / "config.json"
    content = read_json(path, dict[str, Any], "download or export it again")
    _require_architecture(path, content)
    problems = list(_fixed_problems(content))
    block, quantization_problems = _block(content.get("quantization_config"))
    problems += quantization_problems
    values = {key: content[key] for key in ModelConfig.model_fields if content.get(key) is not None}
    values["q_lora_rank"] = content.get("q_lora_rank")
    # What its readers make of null, which is not this project's default: gates that are not
    # normalised, and no shared expert.
    for key, meaning in (("norm_topk_prob", False), ("n_shared_experts", 0)):
        if key in content and content[key] is None:
            values[key] = meaning
    try:
        values |= _rope(content)
        model = ModelConfig.model_validate(values)
    except ValidationError as error:
        found = problems_of(error, values, ModelConfig)
        problems += [f"{key or 'model'}: {text}" for key, text in found]
    except ValueError as error:
        problems.append(str(error))
    modules: Any = content.get("num_nextn_predict_layers", content.get("num_mtp_layers"))
    modules = 0 if modules is None else modules
    if type(modules) is not int or not 0 <= modules <= MOST_MODULES:
        problems.append(
            f"num_nextn_predict_layers: must be a number >= 0 and <= {MOST_MODULES} "
            f"(got {modules!r})"
        )
    if (fed := content.get(TRUNK_HIDDEN, STATES[0])) not in STATES:
        problems.append(f"{TRUNK_HIDDEN}: must be one of {', '.join(STATES)} (got {fed!r})")
    problems += special_problems(content)
    if problems:
        raise ValueError(
            "\n".join([f"{path}: {len(problems)} problem(s)", *(f"  {text}" for text in problems)])
        )
    known = ModelConfig.model_fields.keys() | FIXED.keys() | READ_ONLY.keys() | UNUSED
    unknown = sorted(content.keys() - known - {TRUNK_HIDDEN})
    notes = [f"{path}: not used: {', '.join(unknown)}"] if unknown else []
    ids = {key: content[key] for key in SPECIAL_IDS if key in content}
    return HFSettings(model, modules, block, fed, ids, notes + _latent_notes(model))


def _require_architecture(path: Path, content: dict[str, Any]) -> None:
    """Raises ValueError, one sentence: what else another architecture's keys say is no news."""
    kinds = FIXED["model_type"][1]
    if (found := content.get("model_type")) not in kinds:
        raise ValueError(
            f"{path}: model_type: {found!r} is not supported, only {' and '.join(map(repr, kinds))}"
            ": checkpoints of the architecture DeepseekV3ForCausalLM"
        )


def _fixed_problems(content: dict[str, Any]) -> Iterator[str]:
    accepted = {key: values for key, (_, values) in FIXED.items()} | READ_ONLY
    for key, values in accepted.items():
        value = content.get(key, values[0])
        if value not in values:
            yield f"{key}: {value!r} is not supported, only {values[0]!r}"
    heads = content.get("num_attention_heads")
    if (groups := content.get("num_key_value_heads")) not in (None, heads):
        yield (
            f"num_key_value_heads: {groups} is not num_attention_heads "
            f"= {heads}; latent attention has no groups"
        )


def _block(quantization: Any) -> tuple[tuple[int, int] | None, list[str]]:
    """Block size of an FP8 checkpoint, and what is not supported about its quantisation."""
    if quantization is None:
        return None, []
    if not isinstance(quantization, dict):
        return None, [f"quantization_config: must be a mapping (got {quantization!r})"]
    if quantization.get("quant_method") != "fp8":
        method = quantization.get("quant_method")
        return None, [f"quantization_config: quant_method {method!r} is not supported, only 'fp8'"]
    block = quantization.get("weight_block_size")
    if not (
        isinstance(block, list)
        and len(block) == 2
        and all(isinstance(n, int) and n > 0 for n in block)
    ):
        return None, [f"quantization_config: weight_block_size must hold two sizes (got {block!r})"]
    if quantization.get("fmt", "e4m3") != "e4m3":
        return None, [
            f"quantization_config: fmt {quantization['fmt']!r} is not supported, only 'e4m3'"
        ]
    return (block[0], block[1]), []


def _rope(content: dict[str, Any]) -> dict[str, Any]:
    """rope_theta and rope_scaling, from DeepSeek's two keys or transformers 5's rope_parameters."""
    scaling = content.get("rope_parameters") or content.get("rope_scaling") or {}
    if not isinstance(scaling, dict):
        raise ValueError(f"rope_scaling: must be a mapping (got {scaling!r})")
    scaling = dict(scaling)
    theta = scaling.pop("rope_theta", None) or content.get("rope_theta", 10000.0)
    kind = scaling.pop("rope_type", None)
    kind = scaling.pop("type", kind) or "default"
    if kind == "default":
        return {"rope_theta": theta, "rope_scaling": None}
    if kind != "yarn":
        raise ValueError(f"rope_scaling: type {kind!r} is not supported, only 'yarn'")
    attention_factor = scaling.pop("attention_factor", None)
    # Readers take 0.1 ln(s) + 1 on the rotary part alone when the two are not given.
    scaling = {"mscale": 1.0, "mscale_all_dim": 0.0} | {
        k: v for k, v in scaling.items() if v is not None
    }
    if attention_factor is not None:
        scaling["mscale"] = _mscale(attention_factor, scaling)
    elif not _same_yarn(scaling["mscale"], scaling["mscale_all_dim"]):
        raise ValueError(YARN_PROBLEM.format(**scaling))
    return {"rope_theta": theta, "rope_scaling": {"type": "yarn", **scaling}}


def _mscale(attention_factor: Any, scaling: dict[str, Any]) -> float:
    """The mscale with which the rotary part is multiplied by `attention_factor`, which transformers
    takes in the place of mscale.
    """
    factor: Any = scaling.get("factor")
    numbers = (attention_factor, factor, scaling["mscale_all_dim"])
    if any(type(number) not in (int, float) for number in numbers):
        raise ValueError(
            "rope_scaling: attention_factor, factor and mscale_all_dim must be numbers "
            f"(got {numbers})"
        )
    factor = max(float(factor), 1.0)
    wanted = attention_factor * yarn_mscale(factor, numbers[2])
    if wanted < 1 or (factor == 1 and wanted != 1) or not isfinite(wanted):
        raise ValueError(
            f"rope_scaling: attention_factor {attention_factor}: no mscale >= 0 gives it with "
            f"factor {factor:g} and mscale_all_dim {numbers[2]}"
        )
    return 0.0 if factor == 1 else (wanted - 1) / (0.1 * log(factor))


def _same_yarn(mscale: float, mscale_all_dim: float) -> bool:
    """Readers replace both by a default when one is 0; only mscale 1 with mscale_all_dim 0 is that
    default.
    """
    return bool(mscale and mscale_all_dim) or (mscale == 1 and mscale_all_dim == 0)
