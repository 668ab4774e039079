"""What transformers, vLLM and SGLang make of an exported model, said at export by its shapes.

By reading their code, in the versions that READERS names; transformers' part is tested against it.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from dsv3_mtp.config import ModelConfig
from dsv3_mtp.hf.keys import Slot
from dsv3_mtp.precision.quantise import EDGE

READERS = {"transformers": "transformers 5.23", "vllm": "vLLM 0.33", "sglang": "SGLang 0.5.23"}
ENGINES = ("vllm", "sglang")


class Finding(NamedTuple):
    """fatal: refuses the folder, or computes with other weights. env: of its environment."""

    reader: str
    fatal: bool
    text: str
    env: str = ""

    def __str__(self) -> str:
        return f"{READERS[self.reader]} {self.text}"


TRANSFORMERS = """from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("MODEL")
prompt = AutoTokenizer.from_pretrained("MODEL")("def ", return_tensors="pt")
model.generate(**prompt, {options}, max_new_tokens=64)"""
# It knows MTP weights by a pattern that names layer 61: a model of another depth names its own.
OWN_LAYERS = r"""L, D = model.config.num_hidden_layers, model.config.num_nextn_predict_layers
model._keys_to_ignore_on_load_unexpected = [rf"model\.layers\.{L + k}\..*" for k in range(D)]
"""
SPECULATE = {
    "vllm": """ --speculative-config '{{"method": "mtp", "num_speculative_tokens": {modules}}}'""",
    "sglang": """ --speculative-algorithm EAGLE \\
    --speculative-num-steps 1 --speculative-eagle-topk 1 --speculative-num-draft-tokens 2""",
}
SERVE = {"vllm": "vllm serve MODEL", "sglang": "python -m sglang.launch_server --model-path MODEL"}


def commands(reader: str, modules: int, found: Iterable[Finding]) -> tuple[str, str]:
    """(language, text): how a reader loads an export of so many modules, and drafts with them where
    it can. found: what it makes of the export.
    """
    if reader == "transformers":
        options = "use_mtp=True, do_sample=False" if modules else "do_sample=False"
        before, after = TRANSFORMERS.format(options=options).split("prompt =")
        return "python", f"{before}{OWN_LAYERS if modules else ''}prompt ={after}"
    env = "".join(f"{one.env} " for one in found if one.env)
    drafts = 0 < modules <= (1 if reader == "sglang" else modules)
    more = SPECULATE[reader].format(modules=modules) if drafts else ""
    return "bash", f"{env}{SERVE[reader]}{more}"


def findings(
    model: ModelConfig, expected: Iterable[Slot], modules: int, dtype: str
) -> list[Finding]:
    """What each reader would refuse, misread or leave unused.

    expected: the tensors of the export. dtype: bf16, fp32 or fp8.
    """
    found = [*_kernels(model), *_depths(modules)]
    if dtype == "fp8":
        found += [*_whole_blocks(model), *_equal_blocks(expected)]
    return sorted(found, key=lambda one: not one.fatal)


def equal_blocks(side: int) -> bool | None:
    """How transformers' dequantisation reads a side of a matrix: it divides it into as many equal
    blocks as there are scales (integrations/finegrained_fp8.py). True: rightly; False: other
    weights, and says nothing; None: it refuses the file.
    """
    scales = -(-side // EDGE)
    if side % scales:
        return None
    return scales == 1 or side == scales * EDGE


def _equal_blocks(expected: Iterable[Slot]) -> Iterator[Finding]:
    shapes = {slot.shape: slot.name for slot in expected if slot.quantised}
    for answer, what in ((None, "refuses"), (False, "misreads without a word")):
        odd = [
            f"{name} {list(shape)}"
            for shape, name in shapes.items()
            if answer in (read := [equal_blocks(side) for side in shape])
            and (answer is None or None not in read)
        ]
        if odd:
            yield Finding(
                "transformers",
                True,
                f"{what}, where it dequantises (as on a CPU), FP8 matrices with a side over "
                f"{EDGE} that is no multiple of it: "
                f"{', '.join(odd[:3])}{', ...' if len(odd) > 3 else ''}; use --dtype bf16",
            )


def _whole_blocks(model: ModelConfig) -> Iterator[Finding]:
    """Block-FP8 joins q_a with kv_a, gate with up: each part has to end where a block does."""
    joined = {
        "q_lora_rank": model.q_lora_rank or 0,
        "moe_intermediate_size": model.moe_intermediate_size,
        "intermediate_size": model.intermediate_size if model.first_k_dense_replace else 0,
    }
    if odd := [f"model.{key} {size}" for key, size in joined.items() if size % EDGE]:
        text = (
            f"refuses FP8 with {', '.join(odd)}: multiples of {EDGE} are needed; use --dtype bf16"
        )
        yield from (Finding(reader, True, text) for reader in ENGINES)


def _kernels(model: ModelConfig) -> Iterator[Finding]:
    sizes = (model.kv_lora_rank, model.qk_rope_head_dim)
    if sizes != (512, 64):
        text = (
            f"has MLA kernels for kv_lora_rank 512 and qk_rope_head_dim 64, here {sizes[0]} and "
            f"{sizes[1]}"
        )
        env = "VLLM_MLA_DISABLE=1"
        yield Finding("vllm", False, f"{text}: start it with {env}", env)
        yield Finding("sglang", False, f"{text}: it may not start")


def _depths(modules: int) -> Iterator[Finding]:
    if modules > 1:
        yield Finding("sglang", False, f"loads the trunk, but drafts with 1 module only: {modules}")
        yield Finding(
            "vllm",
            False,
            f"drafts K tokens where {modules} divides K, then takes module 1 again; its first "
            "model runner drafts with module 1 alone",
        )
