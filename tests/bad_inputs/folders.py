"""Files that are read back and are not what was written: prepared data, runs, checkpoints."""

# ruff: noqa: E501
# fmt: off
# A case is a line, however long.

import json
import struct
from pathlib import Path
from typing import Any

from dsv3_mtp.files.digest import file_digest
from tests.bad_inputs.ask import Case as C
from tests.bad_inputs.ask import Damage, both, cut, edit, given, gone, link, put, raw, without

DEEP = "[" * 100_000
DATA, INDEX = "data/tiny", "data/tiny/index.json"
RUN = "runs/tiny"
NEW, OLD = (f"{RUN}/checkpoints/global_step{n}" for n in (2, 1))
HF = "hf/tiny"
SHARD = f"{HF}/model-00002-of-00004.safetensors"
def saved(content: str) -> Damage:
    """A folder as datasets.Dataset.save_to_disk makes it."""
    return both(put("saved/state.json", content), put("saved/dataset_info.json", "{}"))


TEXT = "prepare --out new --vocab-size 300 --input "

# What no JSON file of the project may hold, whatever it is: (name, content)
BROKEN = [
    ("empty", b""),
    ("blanks", b"  \n"),
    ("binary", bytes(range(256))),
    ("deep", DEEP.encode()),
    ("deep in a key", b'{"a":' * 50_000),
    ("a list", b"[1]"),
    ("null", b"null"),
    ("text", b'"text"'),
    ("an empty mapping", b"{}"),
    ("a number of 10,000 digits", b'{"step": ' + b"9" * 10_000 + b"}"),
]


def broken(what: str, path: str, command: str, said: str, **more: Any) -> list[C]:
    found = [C(f"{what}: {name}", command, said, put(path, content), **more) for name, content in BROKEN]
    return [*found, C(f"{what}: cut off", command, said, cut(path, 40), **more)]


def sealed(*damages: Damage, alone: bool = True) -> Damage:
    """Damages the newest checkpoint and completes it again, as one who wants to deceive would.

    alone: there is no other checkpoint.
    """

    def seal(folder: Path) -> None:
        path = folder / NEW / "COMPLETE.json"
        content = json.loads(path.read_text())
        for name in content["files"]:
            content["files"][name] = (folder / NEW / name).stat().st_size
            content["digests"][name] = file_digest(folder / NEW / name)
        path.write_text(json.dumps(content))

    return both(*damages, seal, *([gone(OLD)] if alone else []))


def header(path: str, change: Any) -> Damage:
    """Changes the header of a safetensors file."""

    def changed(content: bytes) -> bytes:
        (length,) = struct.unpack("<Q", content[:8])
        new = change(json.loads(content[8 : 8 + length]))
        text = new if isinstance(new, bytes) else json.dumps(new).encode()
        return struct.pack("<Q", len(text)) + text + content[8 + length :]

    return raw(path, changed)


def first(change: Any) -> Any:
    """Changes what a header says of its first tensor."""

    def changed(content: dict[str, Any]) -> dict[str, Any]:
        name = next(name for name in content if name != "__metadata__")
        return content | {name: content[name] | change(content[name])}

    return changed


def twice(content: dict[str, Any]) -> bytes:
    name = next(name for name in content if name != "__metadata__")
    other = list(content.values())[-1]
    return json.dumps(content)[:-1].encode() + b", " + json.dumps({name: other})[1:].encode()


def overlapping(content: dict[str, Any]) -> dict[str, Any]:
    names = [name for name in content if name != "__metadata__"]
    a, b = (content[name] for name in names[:2])
    size = b["data_offsets"][1] - b["data_offsets"][0]
    start = a["data_offsets"][0]
    return content | {names[1]: b | {"data_offsets": [start, start + size]}}


HEADERS = [
    ("no JSON", lambda h: b"x" * 40),
    ("a list", lambda h: []),
    ("deep", lambda h: DEEP.encode()),
    ("overlapping tensors", overlapping),
    ("a name twice", twice),
    ("offsets of floats", first(lambda t: {"data_offsets": [float(x) for x in t["data_offsets"]]})),
    ("offsets of one number", first(lambda t: {"data_offsets": t["data_offsets"][:1]})),
    ("negative offsets", first(lambda t: {"data_offsets": [-8, t["data_offsets"][1]]})),
    ("offsets beyond the end", first(lambda t: {"data_offsets": [t["data_offsets"][0], 2**40]})),
    ("huge offsets", first(lambda t: {"data_offsets": [0, 2**70]})),
    ("a shape of text", first(lambda t: {"shape": ["x"]})),
    ("a negative shape", first(lambda t: {"shape": [-1, -1]})),
    ("a huge shape", first(lambda t: {"shape": [2**40, 2**40]})),
    ("an unknown type", first(lambda t: {"dtype": "Q7"})),
    ("a type that does not fit", first(lambda t: {"dtype": "F64"})),
    ("no type", first(lambda t: {"dtype": None})),
    ("no tensors", lambda h: {}),
]
LENGTHS = [
    ("nothing at all", lambda b: b""),
    ("four bytes", lambda b: b[:4]),
    ("an endless header", lambda b: struct.pack("<Q", 2**63) + b[8:]),
    ("a header longer than the file", lambda b: struct.pack("<Q", len(b)) + b[8:]),
    ("cut off", lambda b: b[:-10]),
    ("longer than its tensors", lambda b: b + b"more"),
    ("a pickle", lambda b: b"\x80\x04\x95\x10\x00\x00\x00" + b"cos\nsystem\n(S'touch PWNED'\ntR."),
]

TRAIN = "train --config c.yaml --set run.name=new"
DATAS = [
    *broken("data index.json", INDEX, TRAIN, r"data/tiny/index\.json: (damaged|format)"),
    *(
        C(f"data index.json: {name}", TRAIN, rf"data/tiny/index\.json: damaged.*{said}", damage)
        for name, damage, said in (
            ("no splits", without(INDEX, "splits"), "splits"),
            ("splits null", given(INDEX, splits=None), "splits"),
            ("splits a list", given(INDEX, splits=[]), "splits"),
            ("shards text", given(INDEX, splits__train__shards="x"), r"splits\.train\.shards"),
            ("a shard without tokens", given(INDEX, splits__train__shards__0={"file": "train-00000"}), "tokens"),
            ("no hash", without(INDEX, "manifest_hash"), "manifest_hash"),
            ("vocab_size text", given(INDEX, vocab_size="many"), "vocab_size"),
            ("vocab_size 0", given(INDEX, vocab_size=0), "vocab_size"),
            ("vocab_size negative", given(INDEX, vocab_size=-300), "vocab_size"),
            ("bytes 0", given(INDEX, splits__val__bytes=0), "val: tokens of 0 bytes"),
            ("bytes text", given(INDEX, splits__val__bytes="9"), "bytes"),
            ("tokens negative", given(INDEX, splits__train__tokens=-1), "tokens"),
            ("tokens float", given(INDEX, splits__train__tokens=1.5), "tokens"),
            ("a shard elsewhere", given(INDEX, splits__train__shards__0__file="../../x"), "file"),
            ("a shard of root", given(INDEX, splits__train__shards__0__file="/etc/passwd"), "file"),
            ("no arguments", without(INDEX, "arguments"), "arguments"),
            ("eos_id text", given(INDEX, eos_id="x"), "eos_id"),
        )
    ),
    C("data: another format", TRAIN, "format", given(INDEX, format="x")),
    C("data: a newer version", TRAIN, "version|format", given(INDEX, version=99)),
    C("data: no index", TRAIN, r"has no index\.json", gone(INDEX)),
    C("data: tokens that do not add up", TRAIN, "tokens", given(INDEX, splits__train__tokens=9)),
    C("data: no train split", TRAIN, "train", edit(INDEX, lambda x: {**x, "splits": {"val": x["splits"]["val"]}})),
    C("data: no val split", TRAIN, "val", edit(INDEX, lambda x: {**x, "splits": {"train": x["splits"]["train"]}})),
    C("data: val without shards", TRAIN, "val", given(INDEX, splits__val__shards=[])),
    C("data: .bin cut off", TRAIN, r"train-00000\.bin", cut(f"{DATA}/train-00000.bin", -2)),
    C("data: .bin empty", TRAIN, r"train-00000\.bin", put(f"{DATA}/train-00000.bin", b"")),
    C("data: .bin missing", TRAIN, r"train-00000\.bin", gone(f"{DATA}/train-00000.bin")),
    C("data: .bin a folder", TRAIN, r"train-00000\.bin: is no file", both(gone(f"{DATA}/train-00000.bin"), put(f"{DATA}/train-00000.bin/x", ""))),
    C("data: .bin longer", TRAIN, r"train-00000\.(bin|idx)", raw(f"{DATA}/train-00000.bin", lambda b: b + b"xx")),
    C("data: .bin of ids too large", TRAIN, "(65535|vocabulary|vocab_size)", raw(f"{DATA}/train-00000.bin", lambda b: b"\xff\xff" * (len(b) // 2))),
    C("data: val .bin of ids too large", TRAIN, "(65535|vocabulary|vocab_size)", raw(f"{DATA}/val-00000.bin", lambda b: b"\xff\xff" * (len(b) // 2))),
    C("data: one id too large", "evaluate --run runs/tiny --prompts 0", "65535", raw(f"{DATA}/val-00000.bin", lambda b: b[:100] + b"\xff\xff" + b[102:])),
    C("data: .idx cut off", TRAIN, r"train-00000\.idx", cut(f"{DATA}/train-00000.idx", -5)),
    C("data: .idx empty", TRAIN, r"train-00000\.idx", put(f"{DATA}/train-00000.idx", b"")),
    C("data: .idx text", TRAIN, r"train-00000\.idx", put(f"{DATA}/train-00000.idx", b"x" * 7462)),
    C("data: .idx missing", TRAIN, r"train-00000\.(idx|bin)", gone(f"{DATA}/train-00000.idx")),
    C("data: .idx of another type", TRAIN, r"train-00000", raw(f"{DATA}/train-00000.idx", lambda b: b[:17] + b"\x04" + b[18:])),
    C("data: .idx of no type", TRAIN, r"train-00000\.idx", raw(f"{DATA}/train-00000.idx", lambda b: b[:17] + b"\x63" + b[18:])),
    C("data: .idx counts too many", TRAIN, r"train-00000\.idx", raw(f"{DATA}/train-00000.idx", lambda b: b[:18] + struct.pack("<Q", 2**60) + b[26:])),
    C("data: .idx negative lengths", TRAIN, r"train-00000\.(idx|bin)", raw(f"{DATA}/train-00000.idx", lambda b: b[:34] + struct.pack("<i", -5) + b[38:])),
    C("data: tokenizer missing", "generate --run runs/tiny --prompt x", "tokenizer", gone(f"{DATA}/tokenizer.json")),
    C("data: tokenizer empty", "generate --run runs/tiny --prompt x", r"tokenizer\.json", put(f"{DATA}/tokenizer.json", "")),
    C("data: tokenizer a list", "generate --run runs/tiny --prompt x", r"tokenizer\.json", put(f"{DATA}/tokenizer.json", "[]")),
    C("data: tokenizer deep", "generate --run runs/tiny --prompt x", r"tokenizer\.json", put(f"{DATA}/tokenizer.json", DEEP)),
    C("data: eos_id of no token", "generate --run runs/tiny --prompt x", r"tokenizer\.json: has no token 5000.*index\.json", given(INDEX, eos_id=5000)),
    C("data: index a list, generating", "generate --run runs/tiny --prompt x", r"data/tiny/index\.json", put(INDEX, "[]")),
    C("data: a mask that is missing", TRAIN + " --set data.mask=prompts", "not prepared with --mask prompts"),
    C("verify: a flipped bit of data", "prepare --verify data/tiny", r"train-00000\.bin: sha256", raw(f"{DATA}/train-00000.bin", lambda b: b[:-1] + bytes([b[-1] ^ 1]))),
    C("verify: data without hashes", "prepare --verify data/tiny", "sha256", given(INDEX, splits__train__shards__0__sha256={})),
    C("verify: data without splits", "verify data/tiny", "splits", without(INDEX, "splits")),
    C("verify: a tokenizer that was edited", "verify data/tiny", r"tokenizer\.json: sha256", raw(f"{DATA}/tokenizer.json", lambda b: b + b"\n")),
]

PROGRESS = "prepare --out new --input lines.jsonl --vocab-size 300"
PREPARED = [
    *broken("progress.json", "new.partial/progress.json", PROGRESS, r"new\.partial/progress\.json: damaged")[:-1],
    C("prepare: a stranger's folder", PROGRESS, r"new\.partial.*thesis\.txt", put("new.partial/thesis.txt", "x")),
    C("prepare: a stranger's file", PROGRESS, r"new\.partial", put("new.partial", "x")),
    C("prepare: out holds a stranger's file", PROGRESS, "new", put("new/thesis.txt", "x")),
    *(
        C(f"prepare: {name}", (TEXT if "--tokenizer" not in where else "prepare --out new --input ") + where, said, damage)
        for name, where, said, damage in (
            ("no text in it", "bad.txt", "no text|holds no text|empty", put("bad.txt", "")),
            ("no text in JSON lines", "bad.jsonl", "no text|empty", put("bad.jsonl", "")),
            ("lines of null", "bad.jsonl", r"bad\.jsonl", put("bad.jsonl", "null\n")),
            ("lines of lists", "bad.jsonl", r"bad\.jsonl", put("bad.jsonl", "[1]\n")),
            ("lines of no JSON", "bad.jsonl", r"bad\.jsonl", put("bad.jsonl", "{x\n")),
            ("deep lines", "bad.jsonl", r"bad\.jsonl", put("bad.jsonl", DEEP)),
            ("no text key", "bad.jsonl", "--text-key", put("bad.jsonl", '{"body": "x"}\n')),
            ("a text of numbers", "bad.jsonl", r"bad\.jsonl", put("bad.jsonl", '{"text": 5}\n')),
            ("a text of null", "bad.jsonl", r"bad\.jsonl", put("bad.jsonl", '{"text": null}\n')),
            ("half a surrogate", "bad.jsonl", r"bad\.jsonl", put("bad.jsonl", '{"text": "\\ud800"}\n')),
            ("latin-1", "bad.txt", r"bad\.txt", put("bad.txt", b"caf\xe9")),
            ("a gzip that is none", "bad.jsonl.gz", r"bad\.jsonl\.gz", put("bad.jsonl.gz", b"plain")),
            ("a gzip cut off", "bad.jsonl.gz", r"bad\.jsonl\.gz", put("bad.jsonl.gz", b"\x1f\x8b\x08\x00\x00\x00\x00\x00")),
            ("a zstd that is none", "bad.jsonl.zst", r"bad\.jsonl\.zst", put("bad.jsonl.zst", b"plain")),
            ("a parquet that is none", "bad.parquet", r"bad\.parquet", put("bad.parquet", b"plain")),
            ("a link in a circle", "loop.txt", r"loop\.txt", link("loop.txt", "loop.txt")),
            ("a saved data set of nothing", "saved", "saved/state.json", saved("{}")),
            ("a saved data set of a list", "saved", "saved/state.json", saved("[]")),
            ("a saved data set cut off", "saved", "saved/state.json", saved('{"_data')),
            ("a saved data set of deep", "saved", "saved/state.json", saved(DEEP)),
            ("a saved data set of root", "saved", r"saved", saved('{"_data_files": [{"filename": "/etc/passwd"}]}')),
            ("a saved data set outside", "saved", r"saved", saved('{"_data_files": [{"filename": "../c.yaml"}]}')),
            ("a saved data set of no file", "saved", r"saved", saved('{"_data_files": [{"filename": "x.arrow"}]}')),
            ("a saved data set of text", "saved", r"x\.arrow", both(saved('{"_data_files": [{"filename": "x.arrow"}]}'), put("saved/x.arrow", "text"))),
            ("a tokenizer that is none", "words.txt --tokenizer bad.json", r"bad\.json", put("bad.json", "{}")),
            ("a tokenizer cut off", "words.txt --tokenizer bad.json", r"bad\.json", put("bad.json", '{"version"')),
        )
    ),
    *(
        C(f"chats: {name}", "prepare --out new --mask prompts --tokenizer data/tiny/tokenizer.json --input bad.jsonl", r"bad\.jsonl|data/tiny", put("bad.jsonl", text))
        for name, text in (
            ("no messages", '{"x": 1}\n'),
            ("messages text", '{"messages": "x"}\n'),
            ("messages empty", '{"messages": []}\n'),
            ("a message without a role", '{"messages": [{"content": "x"}]}\n'),
            ("a message of null", '{"messages": [null]}\n'),
            ("content a number", '{"messages": [{"role": "user", "content": 5}]}\n'),
            ("a prompt without an answer", '{"prompt": "x"}\n'),
            ("an answer of null", '{"prompt": "x", "completion": null}\n'),
        )
    ),
    *(
        C(f"prompts: {name}", "prepare --out new --from-run runs/tiny --prompts bad.jsonl", r"bad\.jsonl", put("bad.jsonl", text))
        for name, text in (
            ("no JSON", "{x\n"),
            ("nothing", ""),
            ("null", "null\n"),
            ("no prompt", '{"x": 1}\n'),
            ("a prompt of numbers", '{"prompt": 5}\n'),
            ("deep", DEEP),
        )
    ),
]

GENERATE = "generate --run runs/tiny --prompt line"
RESUME = "train --config c.yaml --set train.total_tokens=192"
RUNS = [
    *(
        C(f"run config.yaml: {name}", GENERATE, r"runs/tiny/config\.yaml", put(f"{RUN}/config.yaml", content))
        for name, content in (("empty", b""), ("a list", b"[]"), ("binary", bytes(range(256))), ("deep", DEEP.encode()), ("cut off", b"run: {name: x\n"))
    ),
    C("run config.yaml names code", GENERATE, "--trust-code", raw(f"{RUN}/config.yaml", lambda b: b.replace(b"mode: sequential", b"mode: no.where:No"))),
    C("run of another width", GENERATE, "do not fit|problem", raw(f"{RUN}/config.yaml", lambda b: b.replace(b"hidden_size: 32", b"hidden_size: 64"))),
    C("run without checkpoints", GENERATE, "runs/tiny: no complete checkpoint there; train", gone(f"{RUN}/checkpoints")),
    C("checkpoints is a file", GENERATE, "runs/tiny", both(gone(f"{RUN}/checkpoints"), put(f"{RUN}/checkpoints", "x"))),
    C("a newer format", GENERATE, "newer dsv3_mtp", given(f"{NEW}/COMPLETE.json", format=99)),
    C("a newer format, training", RESUME, "newer dsv3_mtp", given(f"{NEW}/COMPLETE.json", format=99)),
    *(
        C(f"COMPLETE.json: {name}", GENERATE, r"global_step2", both(gone(OLD), put(f"{NEW}/COMPLETE.json", content)))
        for name, content in BROKEN
    ),
    C("COMPLETE.json: a file outside", GENERATE, "global_step2", both(gone(OLD), given(f"{NEW}/COMPLETE.json", files={"../../c.yaml": 5}))),
    C("COMPLETE.json: sizes of text", GENERATE, "global_step2", both(gone(OLD), given(f"{NEW}/COMPLETE.json", files={"index.json": "x"}))),
    C("COMPLETE.json: digests of numbers", GENERATE, "global_step2", both(gone(OLD), given(f"{NEW}/COMPLETE.json", digests={"index.json": 5}))),
    C("COMPLETE.json: missing", GENERATE, "global_step2.*incomplete|no complete checkpoint", both(gone(OLD), gone(f"{NEW}/COMPLETE.json"))),
    *(
        C(f"checkpoint index.json: {name}", GENERATE, r"global_step2.*damaged|index\.json: damaged", sealed(put(f"{NEW}/index.json", content)))
        for name, content in BROKEN
        if name != "an empty mapping"
    ),
    C("checkpoint index.json: of nothing", GENERATE, "do not fit|problem", sealed(put(f"{NEW}/index.json", "{}"))),
    *(
        C(f"checkpoint index.json: {name}", GENERATE, "global_step2.*damaged|index.json: damaged|do not fit", sealed(edit(f"{NEW}/index.json", lambda x, about=about: x | {"model.norm.weight": x["model.norm.weight"] | about})))
        for name, about in (
            ("a hole", {"ranges": [[30, 32, 0]]}),
            ("no ranges", {"ranges": []}),
            ("a negative range", {"ranges": [[-5, 32, 0]]}),
            ("an overlap", {"ranges": [[0, 20, 0], [10, 32, 0]]}),
            ("a rank that is not there", {"ranges": [[0, 32, 7]]}),
            ("a negative rank", {"ranges": [[0, 32, -1]]}),
            ("a range of two", {"ranges": [[0, 32]]}),
            ("a range of floats", {"ranges": [[0, 32.5, 0]]}),
            ("a range of text", {"ranges": "all"}),
            ("a shape of text", {"shape": "x"}),
            ("a shape of nothing", {"shape": []}),
            ("a negative shape", {"shape": [-32]}),
            ("a huge shape", {"shape": [2**40]}),
            ("scalars of text", {"scalars": {"step": "x"}}),
            ("scalars a list", {"scalars": []}),
            ("no states", {"states": None}),
            ("a shape of null", {"shape": None}),
        )
    ),
    C("checkpoint index.json: a tensor missing", GENERATE, "model.norm.weight.*missing", sealed(without(f"{NEW}/index.json", "model.norm.weight"))),
    C("checkpoint index.json: a link out", GENERATE, "global_step2", both(gone(OLD), link(f"{NEW}/index.json", "/etc/passwd"))),
    *(
        C(f"checkpoint shard: {name}", GENERATE, r"global_step2.*damaged.*shard_rank0|shard_rank0\.safetensors", sealed(header(f"{NEW}/shard_rank0.safetensors", change)))
        for name, change in HEADERS
    ),
    *(
        C(f"checkpoint shard: {name}", GENERATE, r"global_step2.*damaged.*shard_rank0|shard_rank0\.safetensors", sealed(raw(f"{NEW}/shard_rank0.safetensors", change)))
        for name, change in LENGTHS
    ),
    C("checkpoint shard: missing", GENERATE, "global_step2", both(gone(OLD), gone(f"{NEW}/shard_rank0.safetensors"))),
    C("checkpoint shard: nan", GENERATE, "holds nan or infinity", sealed(raw(f"{NEW}/shard_rank0.safetensors", lambda b: b[:-400_000] + b"\xff" * 400_000))),
    C("checkpoint: one flipped bit, an older one is there", GENERATE, "shard_rank0.safetensors: is not what was written.*not used", raw(f"{NEW}/shard_rank0.safetensors", lambda b: b[:-9] + bytes([b[-9] ^ 1]) + b[-8:]), code=0),
    C("checkpoint: one flipped bit, none older", GENERATE, "global_step2.*is not what was written", both(gone(OLD), raw(f"{NEW}/shard_rank0.safetensors", lambda b: b[:-9] + bytes([b[-9] ^ 1]) + b[-8:]))),
    C("checkpoint: one flipped bit, none older, export", "export --run runs/tiny --out x", "global_step2.*is not what was written", both(gone(OLD), raw(f"{NEW}/shard_rank0.safetensors", lambda b: b[:-9] + bytes([b[-9] ^ 1]) + b[-8:]))),
    C("checkpoint: one flipped bit, none older, training", RESUME, "global_step2.*is not what was written", both(gone(OLD), raw(f"{NEW}/shard_rank0.safetensors", lambda b: b[:-9] + bytes([b[-9] ^ 1]) + b[-8:]))),
    *(
        C(f"state.json: {name}", RESUME, r"global_step2/state\.json", sealed(damage))
        for name, damage in (
            *((name, put(f"{NEW}/state.json", content)) for name, content in BROKEN),
            ("no sampler", without(f"{NEW}/state.json", "sampler")),
            ("step of text", given(f"{NEW}/state.json", step="x")),
            ("a negative step", given(f"{NEW}/state.json", step=-1)),
            ("negative tokens", given(f"{NEW}/state.json", tokens=-1)),
            ("config a number", given(f"{NEW}/state.json", config=5)),
            ("clock of text", given(f"{NEW}/state.json", clock={"seconds": "x"})),
            ("clock null", given(f"{NEW}/state.json", clock=None)),
            ("negative samples", given(f"{NEW}/state.json", sampler__samples=-3)),
            ("counts of text", given(f"{NEW}/state.json", sampler__counts="x")),
            ("counts of another mixture", given(f"{NEW}/state.json", sampler__counts=[1, 2, 3])),
            ("counts that do not add up", given(f"{NEW}/state.json", sampler__counts=[3])),
            ("layout a number", given(f"{NEW}/state.json", layout=5)),
        )
    ),
    C("COMPLETE.json: counters of DeepSpeed's engine", RESUME, "resumed at step 2", sealed(given(f"{NEW}/COMPLETE.json", counters={"module": 1, "global_steps": 2, "global_samples": 8})), code=0, slow=True),
    C("COMPLETE.json: counters of text", RESUME, "no checkpoint in it is complete", sealed(given(f"{NEW}/COMPLETE.json", counters={"global_steps": "x"}))),
    *(
        C(f"manifest.json: {name}", RESUME, r"runs/tiny/manifest\.json: damaged", put(f"{RUN}/manifest.json", content))
        for name, content in [*BROKEN, ("starts text", b'{"starts": "x"}'), ("no starts", b'{"starts": []}'), ("a start of nothing", b'{"starts": [{}]}')]
    ),
    *(
        C(f"metrics.jsonl: {name}", RESUME, r"runs/tiny/metrics\.jsonl", put(f"{RUN}/metrics.jsonl", content))
        for name, content in (("binary", bytes(range(256)) + b"\n"), ("deep", DEEP.encode() + b"\n"), ("a list", b"[1]\n"), ("no step", b'{"a": 1}\n'), ("a step of text", b'{"step": "x"}\n'), ("a null", b"null\n"))
    ),
    C("run folder is a file", "train --config c.yaml --set run.name=taken", "runs/taken", put("runs/taken", "x")),
    C("run folder is a link to nothing", "train --config c.yaml --set run.name=taken", "runs/taken", link("runs/taken", "nowhere")),
    C("lock is a folder", RESUME, "runs/tiny' cannot be written", both(gone(f"{RUN}/.lock"), put(f"{RUN}/.lock/x", ""))),
    C("verify: one flipped bit", "verify runs/tiny", "global_step2.*shard_rank0.safetensors: is not what was written", raw(f"{NEW}/shard_rank0.safetensors", lambda b: b[:-1] + bytes([b[-1] ^ 1]))),
    C("verify: a run's config", "verify runs/tiny", r"config\.yaml", put(f"{RUN}/config.yaml", "x")),
    C("verify: metrics", "verify runs/tiny", r"metrics\.jsonl", put(f"{RUN}/metrics.jsonl", '{"a": 1}\n')),
    C("verify: manifest", "verify runs/tiny", r"manifest\.json", put(f"{RUN}/manifest.json", "[]")),
    C("verify: a checkpoint that is cut", "verify runs/tiny", "global_step2: incomplete", cut(f"{NEW}/shard_rank0.safetensors", -4)),
    C("verify: an export", "verify hf/tiny", "model-00002-of-00004.safetensors: is not what was written", raw(SHARD, lambda b: b[:-1] + bytes([b[-1] ^ 1]))),
]
CASES = [*DATAS, *PREPARED, *RUNS]
