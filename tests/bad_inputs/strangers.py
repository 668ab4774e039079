"""Checkpoints of strangers, archives of studies, and the environment that a command starts in."""

# ruff: noqa: E501
# fmt: off
# A case is a line, however long.

import shutil
from pathlib import Path

from tests.bad_inputs.ask import Case as C
from tests.bad_inputs.ask import both, cut, edit, given, gone, link, put, raw, without
from tests.bad_inputs.folders import BROKEN, DEEP, HEADERS, HF, LENGTHS, SHARD, header

CONFIG, WEIGHTS = f"{HF}/config.json", f"{HF}/model.safetensors.index.json"
IMPORT, GENERATE = "import --from hf/tiny --out new", "generate --hf hf/tiny --prompt line"
STATEMENTS = [
    ("10^8 layers", {"num_hidden_layers": 10**8}, "num_hidden_layers"),
    ("1000 layers", {"num_hidden_layers": 1000}, r"describes [\d,]+ tensors|missing"),
    ("10^8 modules", {"num_nextn_predict_layers": 10**8}, "num_nextn_predict_layers"),
    ("60 modules", {"num_nextn_predict_layers": 60}, "missing|describes"),
    ("10^9 experts", {"n_routed_experts": 10**9}, "n_routed_experts"),
    ("10^9 wide", {"hidden_size": 10**9}, "hidden_size"),
    ("twice as wide", {"hidden_size": 64}, "has shape"),
    ("10^9 words", {"vocab_size": 10**9}, "vocab_size"),
    ("10^20 words", {"vocab_size": 10**20}, "vocab_size"),
    ("no layers", {"num_hidden_layers": 0}, "num_hidden_layers"),
    ("-1 layers", {"num_hidden_layers": -1}, "num_hidden_layers"),
    ("2.5 layers", {"num_hidden_layers": 2.5}, "num_hidden_layers"),
    ("layers of text", {"num_hidden_layers": "three"}, "num_hidden_layers"),
    ("layers of null", {"num_hidden_layers": None}, "num_hidden_layers"),
    ("layers of true", {"num_hidden_layers": True}, "num_hidden_layers"),
    ("layers of a list", {"num_hidden_layers": [3]}, "num_hidden_layers"),
    ("a hidden size of nan", {"hidden_size": float("nan")}, "hidden_size|JSON|nan|NaN"),
    ("modules of text", {"num_nextn_predict_layers": "one"}, "num_nextn_predict_layers"),
    ("modules of -1", {"num_nextn_predict_layers": -1}, "num_nextn_predict_layers"),
    ("modules of true", {"num_nextn_predict_layers": True}, "num_nextn_predict_layers"),
    ("an eps of 0", {"rms_norm_eps": 0}, "rms_norm_eps"),
    ("an eps of infinity", {"rms_norm_eps": float("inf")}, "rms_norm_eps|Infinity"),
    ("an eps of text", {"rms_norm_eps": "small"}, "rms_norm_eps"),
    ("a theta of 0", {"rope_theta": 0}, "rope_theta"),
    ("a theta of text", {"rope_theta": "x"}, "rope_theta"),
    ("rope_scaling a list", {"rope_scaling": [1, 2]}, "rope_scaling: must be a mapping"),
    ("rope_scaling a word", {"rope_scaling": "yarn"}, "rope_scaling: must be a mapping"),
    ("rope_scaling a number", {"rope_scaling": 7}, "rope_scaling: must be a mapping"),
    ("rope_scaling linear", {"rope_scaling": {"type": "linear", "factor": 2}}, "only 'yarn'"),
    ("rope_scaling without a factor", {"rope_scaling": {"type": "yarn"}}, "rope_scaling"),
    ("rope_scaling of text", {"rope_scaling": {"type": "yarn", "factor": "x", "original_max_position_embeddings": 8}}, "rope_scaling.factor"),
    ("rope_scaling mscale text", {"rope_scaling": {"type": "yarn", "factor": 2, "original_max_position_embeddings": 8, "mscale": "x"}}, "mscale"),
    ("rope_scaling unknown", {"rope_scaling": {"type": "yarn", "factor": 2, "original_max_position_embeddings": 8, "magic": 1}}, "magic"),
    ("rope_parameters a list", {"rope_parameters": [1]}, "rope_(scaling|parameters): must be a mapping"),
    ("quantised by a word", {"quantization_config": "fp8"}, "quantization_config: must be a mapping"),
    ("quantised by another", {"quantization_config": {"quant_method": "awq"}}, "quant_method 'awq'"),
    ("quantised in no blocks", {"quantization_config": {"quant_method": "fp8"}}, "weight_block_size"),
    ("quantised in blocks of 0", {"quantization_config": {"quant_method": "fp8", "weight_block_size": [0, 0]}}, "weight_block_size"),
    ("quantised in e5m2", {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e5m2"}}, "e5m2"),
    ("another architecture", {"model_type": "llama"}, "'llama' is not supported"),
    ("no architecture", {"model_type": None}, "model_type"),
    ("an architecture that is a list", {"model_type": ["deepseek_v3"]}, "model_type"),
    ("another activation", {"hidden_act": "gelu"}, "hidden_act: 'gelu'"),
    ("an activation that is a list", {"hidden_act": []}, "hidden_act"),
    ("softmax scores", {"scoring_func": "softmax"}, "scoring_func"),
    ("greedy topk", {"topk_method": "greedy"}, "topk_method"),
    ("biases", {"attention_bias": True}, "attention_bias"),
    ("tied embeddings", {"tie_word_embeddings": True}, "tie_word_embeddings"),
    ("groups of heads", {"num_key_value_heads": 1}, "num_key_value_heads"),
    ("a layer frequency", {"moe_layer_freq": 2}, "moe_layer_freq"),
    ("rope without pairs", {"rope_interleave": False}, "rope_interleave"),
    ("more experts chosen than there are", {"num_experts_per_tok": 9}, "num_experts_per_tok"),
    ("groups that do not divide", {"n_group": 3}, "n_group"),
    ("heads of 0", {"num_attention_heads": 0}, "num_attention_heads"),
    ("no shared experts", {"n_shared_experts": None}, "shared_experts.*not used"),
    ("three shared experts", {"n_shared_experts": 3}, "has shape"),
]
CONFIGS = [
    *(
        C(f"config.json: {name}", IMPORT, rf"hf/tiny/config\.json.*|{said}", put(CONFIG, content))
        for name, content in BROKEN
        for said in ("model_type",)
    ),
    C("config.json: cut off", IMPORT, r"config\.json: damaged", cut(CONFIG, 40)),
    C("config.json: a key twice", IMPORT, "has shape", raw(CONFIG, lambda b: b.replace(b'"hidden_size": 32', b'"hidden_size": 32, "hidden_size": 64'))),
    C("config.json: missing", IMPORT, r"config\.json: cannot be read", gone(CONFIG)),
    C("config.json: a folder", IMPORT, r"config\.json: cannot be read", both(gone(CONFIG), put(f"{CONFIG}/x", ""))),
    *(C(f"config.json: {name}", IMPORT, said, given(CONFIG, **values)) for name, values, said in STATEMENTS),
    *(
        C(f"generating, config.json: {name}", GENERATE, said, given(CONFIG, **values))
        for name, values, said in STATEMENTS[:12]
    ),
]
FILES = [
    *(
        C(f"weight index: {name}", IMPORT, r"model\.safetensors\.index\.json", put(WEIGHTS, content))
        for name, content in BROKEN
    ),
    C("weight index: a map of numbers", IMPORT, r"index\.json", given(WEIGHTS, weight_map={"x": 5})),
    C("weight index: a map of nothing", IMPORT, "missing|index.json", given(WEIGHTS, weight_map={})),
    C("weight index: a file outside", IMPORT, "passwd", given(WEIGHTS, weight_map={"model.norm.weight": "../../../etc/passwd"})),
    C("weight index: a file that is missing", IMPORT, r"no\.safetensors", edit(WEIGHTS, lambda x: x | {"weight_map": x["weight_map"] | {"model.norm.weight": "no.safetensors"}})),
    C("weight index: a tensor in another file", IMPORT, "puts it into", edit(WEIGHTS, lambda x: x | {"weight_map": x["weight_map"] | {"model.norm.weight": "model-00001-of-00004.safetensors"}})),
    C("weight index: a tensor that is not listed", IMPORT, "but not in model.safetensors.index.json", edit(WEIGHTS, lambda x: x | {"weight_map": {k: v for k, v in x["weight_map"].items() if k != "model.norm.weight"}})),
    C("a missing shard is one line", IMPORT, r"hf/tiny: 1 problem\(s\)\n.*model-00002-of-00004\.safetensors.*No such file", gone(SHARD)),
    C("a missing shard is one line, generating", GENERATE, r"hf/tiny: 1 problem\(s\)\n.*model-00002-of-00004\.safetensors.*No such file", gone(SHARD)),
    C("no weights at all", IMPORT, "holds neither", both(*(gone(f"{HF}/model-0000{n}-of-00004.safetensors") for n in range(1, 5)), gone(WEIGHTS))),
    C("a shard that is a folder", IMPORT, "model-00002.*(directory|folder)", both(gone(SHARD), put(f"{SHARD}/x", ""))),
    C("a shard that is a link out", IMPORT, "is a link out of the folder", link(SHARD, "/etc/passwd")),
    C("a tokenizer that is a link out", IMPORT, r"tokenizer\.json: is a link out of the folder", link(f"{HF}/tokenizer.json", "/etc/passwd")),
    *(C(f"{file}: {name}{kind}", command, rf"{file}: damaged .*; take it from where the folder came from", put(f"{HF}/{file}", content)) for file in ("generation_config.json", "tokenizer_config.json") for kind, command in (("", IMPORT), (", frozen", f"{IMPORT} --frozen")) for name, content in BROKEN if name != "an empty mapping"),
    C("a generation_config.json that is a link out", IMPORT, r"generation_config\.json: is a link out of the folder", link(f"{HF}/generation_config.json", "/etc/passwd")),
    C("a tokenizer that is none", GENERATE, r"tokenizer\.json", put(f"{HF}/tokenizer.json", "{}")),
    C("a tokenizer that is missing", GENERATE, "tokenizer", gone(f"{HF}/tokenizer.json")),
    *(C(f"shard: {name}", IMPORT, r"1 problem\(s\)\n.*model-00002-of-00004\.safetensors", header(SHARD, change)) for name, change in HEADERS if name not in ("an unknown type", "no tensors")),
    *(C(f"shard: {name}", IMPORT, r"1 problem\(s\)\n.*model-00002-of-00004\.safetensors", raw(SHARD, change)) for name, change in LENGTHS),
    C("a shard of another content", IMPORT, "model-00002-of-00004.safetensors: is not what was written", raw(SHARD, lambda b: b[:-1] + bytes([b[-1] ^ 1]))),
    C("a shard of another content, generating", GENERATE, "model-00002-of-00004.safetensors: is not what was written", raw(SHARD, lambda b: b[:-1] + bytes([b[-1] ^ 1]))),
    C("nan in a stranger's weights", IMPORT, "holds nan or infinity", both(without(WEIGHTS, "metadata"), raw(SHARD, lambda b: b[:-64] + b"\xff\xff" * 32))),
    C("nan in a stranger's weights, generating", GENERATE, "holds nan or infinity", both(without(WEIGHTS, "metadata"), raw(SHARD, lambda b: b[:-64] + b"\xff\xff" * 32))),
    C("FP8 without quantization_config", "import --from hf/fp8 --out new", "no quantization_config", without("hf/fp8/config.json", "quantization_config")),
    C("FP8 of other blocks", "import --from hf/fp8 --out new", "scale_inv", given("hf/fp8/config.json", quantization_config__weight_block_size=[8, 8])),
]


def other_run(folder: Path) -> None:
    """A second run, of another learning rate."""
    other = shutil.copytree(folder / "runs/tiny", folder / "runs/other") / "config.yaml"
    other.write_text(other.read_text().replace("lr: 0.003", "lr: 0.004"))


PLAN, RESULTS = "archive/plan.json", "archive/results.jsonl"
FROM = "study --from archive --out new"
STUDY = "study --study study.yaml"
ARCHIVES = [
    *(C(f"plan.json: {name}", FROM, r"archive/plan\.json", put(PLAN, content)) for name, content in BROKEN),
    C("plan.json: cut off", FROM, r"archive/plan\.json", cut(PLAN, 500)),
    C("plan.json: missing", FROM, r"archive: no archive of a study there \(plan\.json is missing\)", gone(PLAN)),
    C("an archive that is nowhere", "study --from nowhere", "nowhere: no archive of a study there"),
    C("an archive that is nowhere, to go on with", "study --from nowhere --resume", "nowhere: no archive of a study there"),
    C("an archive's report below a file", "study --from archive --out c.yaml/x", r"c\.yaml/x: no folder can be made there \(Not a directory"),
    C("plan.json: edited", FROM, "has been edited", given(PLAN, frozen__study__question="another")),
    C("plan.json: another version", FROM, "format", given(PLAN, format=2)),
    C("plan.json: a plan of nothing", FROM, "current|study", given(PLAN, current={})),
    C("plan.json: arms of text", FROM, "arms", given(PLAN, current__study__arms="x")),
    C("plan.json: configs of text", FROM, "configs", given(PLAN, current__configs="x")),
    C("plan.json: a config of text", FROM, "configs", edit(PLAN, lambda x: x["current"]["configs"].update({next(iter(x["current"]["configs"])): "x"}))),
    C("plan.json: a config of code", FROM, "--trust-code", edit(PLAN, lambda x: x["current"]["configs"][next(iter(x["current"]["configs"]))]["mtp"].update(mode="no.where:No"))),
    C("plan.json: a setting that is gone", FROM, "another version", edit(PLAN, lambda x: x["current"]["configs"][next(iter(x["current"]["configs"]))]["optim"].update(old=1))),
    *(C(f"results.jsonl: {name}", FROM, r"archive/results\.jsonl, line 1", put(RESULTS, content.rstrip(b"\n") + b"\n")) for name, content in BROKEN if name not in ("empty", "blanks")),
    C("results.jsonl: cut off", FROM, r"results\.jsonl, line \d+", cut(RESULTS, -500)),
    C("results.jsonl: missing", FROM, r"results\.jsonl", gone(RESULTS)),
    C("results.jsonl: a line twice", FROM, "is there twice", raw(RESULTS, lambda b: b + b.splitlines(keepends=True)[0])),
    C("results.jsonl: nan", FROM, r"line 1", raw(RESULTS, lambda b: b.replace(b'"seed": 1', b'"seed": NaN', 1))),
    C("results.jsonl: a seed of text", FROM, r"line 1: .*seed", raw(RESULTS, lambda b: b.replace(b'"seed": 1', b'"seed": "x"', 1))),
    C("results.jsonl: no starts", FROM, r"line 1: .*starts", raw(RESULTS, lambda b: b.replace(b'"starts"', b'"ends"', 1))),
    *(
        C(f"results.json: {name}", f"{STUDY} --report-only", r"runs/two/chain-seed1/results\.json: damaged", put("runs/two/chain-seed1/results.json", content))
        for name, content in BROKEN
    ),
    C("a run folder of other settings", f"{STUDY} --only chain", "run folders of other settings", lambda f: put("runs/two/chain-seed1/config.yaml", (f / "c.yaml").read_bytes())(f)),
    C("a run folder with a damaged config", f"{STUDY} --only chain", r"chain-seed1/config\.yaml", put("runs/two/chain-seed1/config.yaml", "[")),
    C("compare: a run without metrics", "compare runs/tiny runs/other --out new", "metrics", both(other_run, gone("runs/tiny/metrics.jsonl"))),
    C("compare: out below a file", "compare runs/tiny runs/other --out c.yaml/x", r"c\.yaml/x: no folder can be made there", other_run),
    C("compare: damaged metrics", "compare runs/tiny runs/other --out new", r"metrics\.jsonl", both(other_run, put("runs/tiny/metrics.jsonl", "[]\n"))),
    C("compare: a damaged manifest", "compare runs/tiny runs/other --out new", r"manifest\.json", both(other_run, put("runs/tiny/manifest.json", "[]"))),
]
TRAIN = "train --config c.yaml --set run.name=new"
ENVIRONMENT = [
    C("RANK of text", TRAIN, "RANK.*'?x", env={"RANK": "x", "WORLD_SIZE": "1"}),
    C("WORLD_SIZE of text", TRAIN, "WORLD_SIZE.*'?x", env={"RANK": "0", "WORLD_SIZE": "x"}),
    C("WORLD_SIZE of 0", TRAIN, "WORLD_SIZE", env={"RANK": "0", "WORLD_SIZE": "0"}),
    C("RANK without WORLD_SIZE", TRAIN, "RANK.*WORLD_SIZE|WORLD_SIZE", env={"RANK": "0"}),
    C("WORLD_SIZE without RANK", TRAIN, "RANK", env={"WORLD_SIZE": "2"}),
    C("no MASTER_ADDR", TRAIN, "MASTER_ADDR", env={"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}),
    C("MASTER_PORT of text", TRAIN, "MASTER_PORT", env={"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "x"}),
    C("LOCAL_RANK of text", TRAIN, "LOCAL_RANK", env={"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "x"}),
    C("plan: WORLD_SIZE of text", "plan --config c.yaml", "WORLD_SIZE", env={"WORLD_SIZE": "x"}),
    C("plan: RANK of text", "plan --config c.yaml", "RANK", env={"RANK": "x"}),
    C("wrong config with RANK of text", "plan --config no.yaml", r"no\.yaml|RANK", env={"RANK": "x"}),
    C("deep lines of a tokenizer", "prepare --out new --input words.txt --tokenizer bad.json", r"bad\.json", put("bad.json", DEEP)),
]
CASES = [*CONFIGS, *FILES, *ARCHIVES, *ENVIRONMENT]
