"""Links that lead nowhere, names that no file has, numbers beyond all sizes."""

# ruff: noqa: E501
# fmt: off
# A case is a line, however long.

import shutil
from pathlib import Path

from tests.bad_inputs.ask import Case as C
from tests.bad_inputs.ask import Damage, edit, given, put, raw
from tests.bad_inputs.folders import DATA, HF, INDEX, RUN, SHARD, first, header


def itself(name: str) -> Damage:
    """A link to itself in the place of a file or folder."""

    def damage(folder: Path) -> None:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        path.symlink_to(path.name)

    return damage


def mapped(name: str) -> Damage:
    """The weight index says that a tensor is in another file."""
    return edit(WEIGHTS, lambda x: x | {"weight_map": x["weight_map"] | {"model.norm.weight": name}})


DIGITS = "9" * 5000
CONFIG, WEIGHTS, TOKENIZER = (f"{HF}/{name}" for name in ("config.json", "model.safetensors.index.json", "tokenizer.json"))
GENERATE, FROM_HF = "generate --run runs/tiny --prompt line ", "generate --hf hf/tiny --prompt line "
IMPORT, FP8 = "import --from hf/tiny --out new", "import --from hf/fp8 --out new"
TRAIN = "train --config c.yaml --set run.name=new"
LINKS = [
    C("itself: a prompt", "generate --run runs/tiny --prompt-file loop", "loop: Too many levels", itself("loop")),
    C("itself: a shard", IMPORT, "model-00002-of-00004.safetensors: is a link out", itself(SHARD)),
    C("itself: a weight index", IMPORT, "model.safetensors.index.json: is a link that leads to no file", itself(WEIGHTS)),
    C("itself: a tokenizer", FROM_HF, "has no tokenizer.json", itself(TOKENIZER)),
    C("itself: checkpoints", GENERATE, "no complete checkpoint", itself(f"{RUN}/checkpoints")),
    C("itself: data", TRAIN, "data/tiny: neither", itself(DATA)),
    C("itself: data index.json", TRAIN, r"has no index\.json", itself(INDEX)),
    C("a config that is its base", GENERATE, "build on one another", put(f"{RUN}/config.yaml", "base: config.yaml\n")),
]
NAMES = [
    C("zero byte: run.dir", "train --config c.yaml --set 'run.dir=\"a\\0b\"'", r"run\.dir: must be a path"),
    C("zero byte: data", "train --config c.yaml --set 'data.train=\"a\\0b\"'", r"data\.train: must be a path"),
    C("zero byte: weight index", IMPORT, "is the name of no file", mapped("a\0b")),
    C("weight index: a folder", IMPORT, "tiny: Is a directory", mapped(".")),
    C("weight index: config.json", IMPORT, "config.json: cut off", mapped("config.json")),
    C("weight index: metadata a number", IMPORT, "metadata", edit(WEIGHTS, lambda x: x | {"metadata": 5})),
    C("a device without a name", GENERATE + "--device ''", "--device "),
    C("lm-eval of nothing", "evaluate --run runs/tiny --lm-eval ''", "--lm-eval '': must name tasks"),
    C("lm-eval of half a list", "evaluate --run runs/tiny --lm-eval a,", "--lm-eval 'a,': must name tasks"),
    C("stop at nothing", GENERATE + "--stop ''", "--stop ''"),
    C("ids of a power", "generate --run runs/tiny --prompt-ids ²", "must be whole numbers"),
    C("a prompt that is no text", "generate --run runs/tiny --prompt '\udcff'", "not UTF-8"),
]
NUMBERS = [
    C("digits: YAML", "plan --config b.yaml", "a number of 5,000 digits", put("b.yaml", f"run: {{seed: {DIGITS}}}\n")),
    C("digits: --set", f"plan --config c.yaml --set run.seed={DIGITS}", "a number of 5,000 digits"),
    C("digits: ids", f"generate --run runs/tiny --prompt-ids {'9' * 900}", "must be whole numbers|vocabulary"),
    C("digits: config.json", IMPORT, "number out of range", raw(CONFIG, lambda b: b.replace(b'"hidden_size": 32', b'"hidden_size": ' + DIGITS.encode()))),
    C("infinity: config.json", IMPORT, "rope_theta: must be finite", given(CONFIG, rope_theta=float("inf"))),
    C("nan: config.json", IMPORT, "rms_norm_eps: must be finite", given(CONFIG, rms_norm_eps=float("nan"))),
    C("text: config.json", IMPORT, "rms_norm_eps: must be a number, without quotes", given(CONFIG, rms_norm_eps="1e-6")),
    C("truth: config.json", IMPORT, "moe_intermediate_size: must be a number .got true", given(CONFIG, moe_intermediate_size=True)),
    C("half a YaRN: config.json", IMPORT, "rope_scaling.factor: missing", given(CONFIG, rope_scaling={"type": "yarn"})),
    C("a shape of 1000 sides", IMPORT, r"down_proj.weight: has shape \[1, 1, .*\.\.\., config", header(SHARD, first(lambda t: {"shape": [1] * 1000 + t["shape"]}))),
    C("a side that is true", IMPORT, "model-00002-of-00004.safetensors: invalid JSON", header(SHARD, first(lambda t: {"shape": [True, *t["shape"]]}))),
    C("metadata of numbers", IMPORT, "model-00002-of-00004.safetensors: invalid JSON", header(SHARD, lambda h: h | {"__metadata__": {"a": 1}})),
    C("a header of UTF-16", IMPORT, "model-00002-of-00004.safetensors: Invalid JSON", header(SHARD, lambda h: str(h).encode("utf-16"))),
    *(C(f"FP8 blocks: {size}", FP8, "must hold two sizes", given("hf/fp8/config.json", quantization_config__weight_block_size=size)) for size in ([128], [0, 128], "128")),
    C("FP8 of another format", FP8, "fmt 'e5m2' is not supported", given("hf/fp8/config.json", quantization_config__fmt="e5m2")),
    C("a token of a negative id", FROM_HF, "tokenizer.json: not a Hugging Face tokenizer.json", edit(TOKENIZER, lambda c: c["model"]["vocab"].update(zzz=-1))),
    C("a merge of no token", FROM_HF, "tokenizer.json: not a Hugging Face tokenizer.json", edit(TOKENIZER, lambda c: c["model"].update(merges=[["q", "no"]]))),
]
DRAFTS = [
    C("recycle: nothing to recycle", GENERATE + "--speculative --recycle cycle", "--recycle cycle: no effect on 1 drafts"),
    C("recycle: evaluate", "evaluate --run runs/tiny --recycle last", "--recycle last: no effect on 1 drafts"),
    C("recycle: plain decoding", GENERATE + "--recycle last", "--recycle: only with --speculative"),
    C("draft depth: no prompts", "evaluate --run runs/tiny --prompts 0 --draft-depth 3", "--draft-depth: no effect"),
    C("draft depth: too long", "evaluate --run runs/tiny --draft-depth 1000000", "max_position_embeddings = 16"),
]
CASES = [*LINKS, *NAMES, *NUMBERS, *DRAFTS]
