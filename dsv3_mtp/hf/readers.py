"""What vLLM, SGLang and transformers ask of an exported model's shapes, said at export.

By reading their code: vLLM 0.33, SGLang 0.5.23, transformers 5.23. No engine is run here.
"""

from collections.abc import Iterator

from dsv3_mtp.config import ModelConfig
from dsv3_mtp.precision.quantise import EDGE


def reader_notes(model: ModelConfig, modules: int, dtype: str) -> list[str]:
    """One sentence for each reader that will not load this model, or not use all of it.

    dtype: bf16, fp32 or fp8.
    """
    return [*_fp8(model, dtype), *_kernels(model), *_depths(modules)]


def _fp8(model: ModelConfig, dtype: str) -> Iterator[str]:
    """vLLM's and SGLang's block-FP8 layers join q_a with kv_a, and gate with up: each part has to
    end where a block ends.
    """
    if dtype != "fp8":
        return
    joined = {
        "q_lora_rank": model.q_lora_rank or 0,
        "moe_intermediate_size": model.moe_intermediate_size,
        "intermediate_size": model.intermediate_size if model.first_k_dense_replace else 0,
    }
    if odd := [f"{key} {size}" for key, size in joined.items() if size % EDGE]:
        yield (
            f"vLLM and SGLang do not load this in FP8: {', '.join(odd)}: multiples of {EDGE} are "
            "needed; use --dtype bf16"
        )


def _kernels(model: ModelConfig) -> Iterator[str]:
    sizes = (model.kv_lora_rank, model.qk_rope_head_dim)
    if sizes != (512, 64):
        yield (
            f"vLLM's and SGLang's MLA kernels are for kv_lora_rank 512 and qk_rope_head_dim 64, "
            f"here {sizes[0]} and {sizes[1]}; vLLM takes other sizes with VLLM_MLA_DISABLE=1"
        )


def _depths(modules: int) -> Iterator[str]:
    if modules > 1:
        yield (
            f"SGLang drafts with 1 module only, here are {modules}; vLLM's first model runner "
            "drafts with the first of them alone"
        )
