"""What the cases damage: a config, prepared data, a trained run, its export, a study and so on.

c.yaml            a tiny text run      task.yaml   the same on a generated task
data/tiny         prepared text        words.txt, chats.jsonl, prompts.jsonl   text to prepare
runs/tiny         trained two steps, a checkpoint of each
hf/tiny           its export in three files or so; hf/fp8, in FP8
study.yaml        two arms             archive/    of a study that has run
"""

import importlib
import json
import shutil
from pathlib import Path

from dsv3_mtp.cli.command import COMMANDS
from dsv3_mtp.hf import export_hf
from dsv3_mtp.runs.model import load_model
from tests.bad_inputs.ask import ask
from tests.conftest import tiny

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = {
    "model.vocab_size": 300,
    "train.total_tokens": 128,
    "train.dtype": "float32",
    "checkpoint.every": 1,
    "eval.every": 0,
}
STUDY = """
run: {name: two, dir: runs}
question: Is one of them lower?
expectation: I expect no difference.
scales: {cpu: {base: c.yaml, flops_per_s: 1.0e9}}
seeds: [1]
arms:
  none: {about: no heads, set: {mtp.mode: none, mtp.num_nextn_predict_layers: 0}}
  chain: {about: the chain}
comparisons:
  heads: {against: none, arms: [chain], rule: added parameters}
primary: {metric: val/main_loss, comparison: heads, margin: 0.1}
"""


def make_world(folder: Path) -> Path:
    folder.mkdir()
    (folder / "c.yaml").write_text(tiny(SETTINGS).to_yaml())
    words = [f"line {n} of a text that says {n * n % 97} and {n % 7}" for n in range(400)]
    (folder / "words.txt").write_text("\n".join(words))
    (folder / "lines.jsonl").write_text("".join(json.dumps({"text": w}) + "\n" for w in words))
    chat = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "x"}]}
    (folder / "chats.jsonl").write_text(json.dumps(chat) + "\n")
    (folder / "prompts.jsonl").write_text(json.dumps({"prompt": "line 1"}) + "\n")
    (folder / "study.yaml").write_text(STUDY)
    (folder / "archive").mkdir()
    for name in ("plan.json", "results.jsonl"):
        shutil.copy(ROOT / "docs/studies/scaling" / name, folder / "archive" / name)
    for command in (
        "prepare --out data/tiny --input lines.jsonl --vocab-size 300",
        "train --config c.yaml",
    ):
        answer = ask(command, folder)
        assert answer.code == 0, answer
    export_hf(folder / "runs/tiny", folder / "hf/tiny", dtype="bf16", shard_bytes=60_000)
    export_hf(folder / "runs/tiny", folder / "hf/fp8", dtype="fp8")
    # what the commands import is there for every case
    load_model(folder / "runs/tiny")
    commands = [f"cli.{module}" for module, _ in COMMANDS.values()]
    for name in [*commands, "study.run", "study.report"]:
        importlib.import_module(f"dsv3_mtp.{name}")
    return folder
