"""Files that are whole and untrue: results of other runs, ids of other models, things that are no
files; and settings that nobody means.
"""

# ruff: noqa: E501
# fmt: off
# A case is a line, however long.

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.bad_inputs.ask import Case as C
from tests.bad_inputs.ask import Damage, both, cut, edit, given, gone, put, raw, without
from tests.bad_inputs.folders import DATA, HF, INDEX, NEW, OLD, RUN, SHARD, sealed

GENERATE, TRAIN, PLAN = "generate --run runs/tiny --prompt line", "train --config c.yaml --set run.name=new", "plan --config c.yaml --set "
RESUME, IMPORT, FROM = "train --config c.yaml --set train.total_tokens=192", "import --from hf/tiny --out new", "study --from archive"
CONFIG, WEIGHTS, TOKENIZER = (f"{HF}/{name}" for name in ("config.json", "model.safetensors.index.json", "tokenizer.json"))
RESULTS, FROZEN = "archive/results.jsonl", "archive/plan.json"
NAME = "train --config c.yaml --set run.name="


def folder(name: str) -> Damage:
    def damage(world: Path) -> None:
        (world / name).unlink(missing_ok=True)
        (world / name).mkdir()

    return damage


def fifo(name: str) -> Damage:
    """Nothing ever comes out of it."""

    def damage(world: Path) -> None:
        (world / name).unlink(missing_ok=True)
        os.mkfifo(world / name)

    return damage


def swapped(one: str, other: str) -> Damage:
    def damage(world: Path) -> None:
        first, second = (world / one).read_bytes(), (world / other).read_bytes()
        (world / one).write_bytes(second)
        (world / other).write_bytes(first)

    return damage


def first(change: Callable[[dict[str, Any]], None]) -> Damage:
    """Changes the record of the first run in an archive."""

    def changed(content: bytes) -> bytes:
        line, _, rest = content.partition(b"\n")
        record = json.loads(line)
        change(record)
        return json.dumps(record).encode() + b"\n" + rest

    return raw(RESULTS, changed)


def more_tokens(path: str) -> Damage:
    return edit(path, lambda content: content["model"]["vocab"].update({f"zz{n}": 1000 + n for n in range(300)}))


LINE = r"archive/results\.jsonl, line 1: damaged"
ARCHIVES = [
    C("results: empty", FROM, "no run is finished and measured", put(RESULTS, "")),
    C("results: binary", FROM, LINE, put(RESULTS, bytes(range(256)))),
    C("results: a folder", FROM, r"results\.jsonl: Is a directory", folder(RESULTS)),
    C("results: a line of null", FROM, LINE, raw(RESULTS, lambda b: b"null\n" + b)),
    C("results: a line twice", FROM, r"line 2: .* is there twice", raw(RESULTS, lambda b: b.partition(b"\n")[0] + b"\n" + b)),
    C("results: cut off", FROM, "line 10: damaged", cut(RESULTS, -40)),
    C("results: latin-1", FROM, LINE, raw(RESULTS, lambda b: b.replace(b'"', b'"\xe9', 1))),
    C("results: a metric of text", FROM, "val/main_loss must be a number", first(lambda r: r.update(metrics={"val/main_loss": "x"}))),
    C("results: an infinite metric", FROM, "val/main_loss must be finite", first(lambda r: r.update(metrics={"val/main_loss": float("inf")}))),
    C("results: a seed of text", FROM, "seed must be an integer", first(lambda r: r.update(seed="x"))),
    C("results: an arm of another study", FROM, "line 1: nobody is no arm of this study", first(lambda r: r.update(arm="nobody"))),
    C("results: curves of two lengths", FROM, "must be as many as tokens, 2", first(lambda r: r["curves"].update({"val/main_loss": {"tokens": [1, 2], "values": [1.0]}}))),
    C("results: gone", FROM, r"results\.jsonl: No such file", gone(RESULTS)),
    C("plan.json: frozen a list", FROM, "frozen must be a mapping", given(FROZEN, frozen=[])),
    C("plan.json: no current", FROM, "current missing", without(FROZEN, "current")),
    C("plan.json: no configs", FROM, "current.configs has none of n0.1_none", given(FROZEN, current__configs={})),
    C("plan.json: a config of null", FROM, "must be a mapping .got null", edit(FROZEN, lambda p: p["current"]["configs"].update(dict.fromkeys([*p["current"]["configs"]][:1])))),
    C("plan.json: no study", FROM, "current.study must be a mapping", given(FROZEN, current__study=None)),
    C("plan.json: a metric of no run", FROM, r"current\.study\.metrics\[0\]: no run is measured by it", given(FROZEN, current__study__metrics=["val/mtp_term/none"])),
    C("plan.json: another hash", FROM, "has been edited after the first start", given(FROZEN, hash="00")),
    C("plan.json: sets of a number", FROM, "sets input should be a valid list", given(FROZEN, sets=5)),
]
NO_FILES = [
    C("latin-1: config.yaml", GENERATE, "codec can't decode", put(f"{RUN}/config.yaml", b"run: {name: caf\xe9}\n")),
    C("a folder: config.yaml", GENERATE, "no config.yaml there", folder(f"{RUN}/config.yaml")),
    C("a fifo: config.yaml", GENERATE, "no config.yaml there", fifo(f"{RUN}/config.yaml")),
    C("a device: a config", "plan --config /dev/null", "must hold a mapping of sections"),
    C("a folder: a prompt", "generate --run runs/tiny --prompt-file data", "--prompt-file data: Is a directory"),
    C("latin-1: a prompt", "generate --run runs/tiny --prompt-file p.txt", "not UTF-8 text", put("p.txt", b"caf\xe9")),
    C("empty: a prompt", "generate --run runs/tiny --prompt-file p.txt", "the prompt is empty", put("p.txt", b"")),
    C("a fifo: a tokenizer", GENERATE, "has no tokenizer.json", fifo(f"{DATA}/tokenizer.json")),
    C("a fifo: data index.json", TRAIN, "has no index.json", fifo(INDEX)),
    C("a device: out", "prepare --out /dev/null --input lines.jsonl --vocab-size 300", "/dev/null: is a file"),
    C("below a device: out", "import --from hf/tiny --out /dev/null/x", "no folder can be made there"),
    C("no place: out", "export --run runs/tiny --out /proc/x", "/proc"),
    C("here: out", "prepare --out . --input lines.jsonl --vocab-size 300", "names no folder to make"),
    C("no name: out", "prepare --out '' --input lines.jsonl --vocab-size 300", "names no folder to make"),
    C("no name: export's out", "export --run runs/tiny --out ''", "exists already"),
    C("no name: import's from", "import --from '' --out new", "config.json: cannot be read"),
    C("no name: input", "prepare --out new --input '' --vocab-size 300", "no file is there or matches it"),
    C("half a pattern: input", "prepare --out new --input '[' --vocab-size 300", "no file is there or matches it"),
    C("UTF-16: input", "prepare --out new --input u.jsonl --vocab-size 300", "u.jsonl, line 1: not valid JSON", put("u.jsonl", '{"text": "x"}\n'.encode("utf-16"))),
    C("a folder: a tokenizer", "prepare --out new --input words.txt --tokenizer data", "data: no such file"),
    C("no place: run.dir", "train --config c.yaml --set run.dir=/proc/x", "cannot be written"),
    C("below a device: run.dir", "train --config c.yaml --set run.dir=/dev/null/x", "cannot be written .Not a directory"),
]
OTHERS = [
    C("a shard of another step", GENERATE, "shard_rank0.safetensors: is not what was written", both(swapped(f"{NEW}/shard_rank0.safetensors", f"{OLD}/shard_rank0.safetensors"), gone(OLD))),
    C("state.json: a negative step, sealed", RESUME, r"state\.json: damaged", sealed(given(f"{NEW}/state.json", step=-5))),
    C("state.json: a step of text", RESUME, r"state\.json: damaged .step", sealed(given(f"{NEW}/state.json", step="x"))),
    C("state.json: no sampler, sealed", RESUME, r"state\.json: damaged .sampler", sealed(without(f"{NEW}/state.json", "sampler"))),
    *(
        C(f"config.json: {key} {value!r}", IMPORT, rf"{key}: must be token ids below vocab_size = 300, or null", given(CONFIG, **{key: value}))
        for key, value in (("eos_token_id", ["x"]), ("eos_token_id", -1), ("eos_token_id", 300), ("eos_token_id", {"a": 1}), ("eos_token_id", True), ("eos_token_id", 1.5), ("eos_token_id", []), ("eos_token_id", [1, 10**6]), ("bos_token_id", "x"), ("pad_token_id", "0"))
    ),
    C("config.json: eos of text, generating", "generate --hf hf/tiny --prompt line", "eos_token_id: must be token ids", given(CONFIG, eos_token_id=["x"])),
    C("config.json: tied", IMPORT, "tie_word_embeddings: True is not supported", given(CONFIG, tie_word_embeddings=True)),
    C("config.json: an act in a list", IMPORT, "hidden_act: ..silu.. is not supported", given(CONFIG, hidden_act=["silu"])),
    C("config.json: FP8 in a list", IMPORT, "quantization_config: must be a mapping", given(CONFIG, quantization_config=[1])),
    C("a tokenizer of more tokens", "generate --hf hf/tiny --prompt line", "has token ids up to 1299, but the model's vocab_size is 300", more_tokens(TOKENIZER)),
    C("data's tokenizer of more tokens", GENERATE, "has token ids up to 1299, but the model's vocab_size is 300", more_tokens(f"{DATA}/tokenizer.json")),
    C("two shards swapped", IMPORT, "which lacks it", swapped(f"{HF}/model-00001-of-00004.safetensors", SHARD)),
    C("weight index: a map in a list", IMPORT, "weight_map: Input should be an object", given(WEIGHTS, weight_map=[])),
    C("weight index: all in one file", IMPORT, "which lacks it", edit(WEIGHTS, lambda x: x["weight_map"].update(dict.fromkeys(x["weight_map"], "model-00001-of-00004.safetensors")))),
    C("data: a shard twice", TRAIN, "its shards have", edit(INDEX, lambda x: x["splits"]["train"]["shards"].append(x["splits"]["train"]["shards"][0]))),
]
SETS = [
    *(C(f"set: {text}", PLAN + text, "must be KEY=VALUE") for text in ("=", "optim.lr", "run..name=1", ".=1")),
    *(C(f"run.name: {text}", NAME + text, r"run\.name: must be") for text in ("..", ".", "''", "'\"a\\nb\"'")),
    C("run.name: 300 letters", NAME + "n" * 300, "File name too long"),
    C("set: half a mapping", PLAN + "'run={name: x'", "invalid YAML"),
    C("set: an alias of nothing", PLAN + "'optim.lr=*a'", "undefined alias"),
    C("set: a tag of Python", PLAN + "'optim.lr=!!python/object:os.system x'", "could not determine a constructor"),
    C("set: no sources", "train --config c.yaml --set data.train=[]", "at least one corpus"),
    C("set: a weight of 0", "train --config c.yaml --set 'data.train=[{path: data/tiny, weight: 0}]'", r"weight: must be > 0"),
    C("set: a weight of nan", "train --config c.yaml --set 'data.train=[{path: data/tiny, weight: .nan}]'", r"weight: must be finite"),
    C("set: one beta", PLAN + "optim.betas=[0.9]", r"betas\[1\]: missing"),
    C("set: betas of 1", PLAN + "optim.betas=[1,1]", r"betas\[1\]: must be < 1"),
    C("set: an endless rate", PLAN + "optim.lr=1e999", "must be finite"),
    C("set: wide digits", PLAN + "optim.lr=\uff11", "must be a number"),
    C("set: W&B without a project", PLAN + "log.wandb={}", "project: missing"),
    C("set: DeepSpeed's own batch", TRAIN + " --set 'deepspeed={train_batch_size: 3}'", "set train.batch_size instead"),
    C("ids: nothing", "generate --run runs/tiny --prompt-ids ''", "the prompt is empty"),
    C("ids: a float", "generate --run runs/tiny --prompt-ids 1e3", "must be whole numbers"),
]
STUDIES = [
    C("study: a base that is a folder", "study --study study.yaml --dry-run --set scales.cpu.base=data", "Is a directory"),
    C("study: a name upward", "study --study study.yaml --dry-run --set run.name=..", "plain folder name"),
    C("study: a circle", "study --study s.yaml --dry-run", r"s\.yaml", put("s.yaml", "arms: &a [*a]\n")),
    C("study: only nothing", "study --study study.yaml --only ''", "--only '': must name an arm"),
    C("verify: no name", "verify ''", "no run"),
    C("verify: a device", "verify /dev/null", "no run"),
    C("compare: a run with itself", "compare runs/tiny runs/tiny --out x", "there is nothing to compare"),
]
CASES = [*ARCHIVES, *NO_FILES, *OTHERS, *SETS, *STUDIES]
