"""Training speed and memory, as ratios from interleaved processes.

Examples:
    python tools/bench.py --preset tiny --against transformers             # the same weights and batch in both
    python tools/bench.py --config configs/v3_tiny.yaml --parts            # where the time of a step goes
    python tools/bench.py --preset tiny --against depths                   # D = 0, 1, 2, 4, sequential and parallel
    python tools/bench.py --config configs/v3_3b.yaml --against fp8        # on a Hopper GPU: both FP8 backends
    python tools/bench.py --preset tiny --loss-memory --set model.vocab_size=32768
    python tools/bench.py --startup                                        # from the command to the first step
Every variant has a process of its own; in each round each runs one step, in random order. On a CPU the times are CPU
seconds of the process, so that other work on the machine touches the ratios little. A ratio is the median of the
rounds' ratios, with its quartiles in brackets. MFU is against the best product of the same round and dtype.
Exit codes: 0 done, 2 wrong options or config.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench_models import SMALL, TINY
from bench_process import ROOT, Child, last_words, python_path

PRESETS = {"tiny": TINY, "small": SMALL}  # over configs/v3_tiny.yaml, without heads, 8 x 256 tokens per step
AGAINST = ("transformers", "plain", "depths", "fp8")
DEPTHS = [("sequential", d) for d in (1, 2, 4)] + [("parallel", d) for d in (1, 2, 4)]


def main() -> int:
    options = parse()
    sys.path.insert(0, str(ROOT))
    os.environ.setdefault("OMP_NUM_THREADS", str(options.threads))
    from dsv3_mtp.config import load_config

    sets = options.sets
    if options.preset is not None:
        keys = [f"model.{key}={value}" for key, value in PRESETS[options.preset].items()]
        sets = [*keys, "mtp.mode=none", "train.batch_size=8", "train.micro_batch_size=8", *sets]
    try:
        config = load_config(options.config, sets)
        if options.startup:
            text, result = startup(options)
        elif options.loss_memory:
            text, result = loss_memory(config.to_dict(), options)
        else:
            text, result = compare(config.to_dict(), options)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(text)
    if options.json is not None:
        Path(options.json).write_text(json.dumps(result, indent=2) + "\n")
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=str(ROOT / "configs/v3_tiny.yaml"), metavar="YAML")
    parser.add_argument("--set", action="append", default=[], dest="sets", metavar="a.b=c", help="as in tools/train.py")
    parser.add_argument("--preset", choices=PRESETS, help="a model of 12M or 28M parameters without MTP heads")
    parser.add_argument("--against", nargs="+", default=[], choices=AGAINST, help="what to compare with")
    parser.add_argument("--compile", action="store_true", help="also with every block through torch.compile")
    parser.add_argument("--parts", action="store_true", help="also attention, MoE, loss, optimizer, each alone")
    parser.add_argument("--profile", metavar="FILE", help="also a Chrome trace of one step")
    parser.add_argument("--loss-memory", action="store_true", help="peak memory of the heads' loss instead")
    parser.add_argument("--startup", action="store_true", help="seconds from the command to the first step instead")
    parser.add_argument("--rounds", type=int, default=9, metavar="N", help="default: 9")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="default: 1")
    parser.add_argument("--json", metavar="FILE", help="write the numbers there as well")
    options = parser.parse_args()
    for key in ("rounds", "threads"):
        if getattr(options, key) < 1:
            parser.error(f"--{key} {getattr(options, key)}: must be at least 1")
    return options


def variants(config: dict[str, Any], options: argparse.Namespace) -> list[Child]:
    """The first one is what the others are compared with."""
    own_dtype = config["train"]["dtype"]

    def ours(name: str, *, tuned: bool = True, compiled: bool = False, section: str = "mtp", **changes: Any) -> Child:
        changed = config | {section: config[section] | changes}
        return Child(name, {"kind": "ours", "config": changed, "tuned": tuned, "compiled": compiled})

    def theirs(name: str, dtype: str, *, tuned: bool) -> Child:
        changed = config | {"train": config["train"] | {"dtype": dtype}}
        return Child(name, {"kind": "transformers", "config": changed, "tuned": tuned})

    if "depths" in options.against:
        rows = [ours("D=0", mode="none")]
        return rows + [ours(f"{mode} D={d}", mode=mode, num_nextn_predict_layers=d) for mode, d in DEPTHS]
    rows = []
    if "transformers" in options.against:
        if config["mtp"]["mode"] != "none":
            raise ValueError("--against transformers: it trains no MTP heads; add --set mtp.mode=none")
        import torch

        if torch.cuda.is_available():  # what is tuned are settings of the CPU, and fused AdamW
            rows.append(theirs("transformers", own_dtype, tuned=True))
        else:  # in bfloat16 both dtypes, against transformers as it comes, which is float32
            rows.append(theirs("transformers", "float32", tuned=False))
            rows.append(theirs("transformers, tuned", "float32", tuned=True))
            if own_dtype != "float32":
                rows.append(theirs(f"transformers {own_dtype}, tuned", own_dtype, tuned=True))
                rows.append(ours("dsv3_mtp float32", section="train", dtype="float32"))
    if "plain" in options.against:
        rows.append(ours("dsv3_mtp without tuning", tuned=False))
    if "fp8" in options.against:
        rows.append(ours("dsv3_mtp", section="fp8", enabled=False))
        for backend in ("te", "torch"):
            rows.append(ours(f"dsv3_mtp FP8 by {backend}", section="fp8", enabled=True, backend=backend))
            rows[-1].optional = True
    else:
        rows.append(ours("dsv3_mtp"))
    if options.compile:
        rows.append(ours("dsv3_mtp, compiled", tuned=False, compiled=True))
    return rows


def compare(config: dict[str, Any], options: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    children, missing = variants(config, options), list[str]()
    try:
        for child in children:
            child.start(options.threads)
        for child in list(children):
            try:
                child.first = child.answer()
            except ValueError as error:
                if not child.optional:
                    raise
                children.remove(child)
                missing.append(f"not run: {error}")
        ours = next(c for c in children if c.spec["kind"] == "ours" and c.dtype == config["train"]["dtype"])
        peaks: dict[str, list[float]] = {child.dtype: [] for child in children}
        for _ in range(options.rounds):
            for dtype, rates in peaks.items():
                rates.append(ours.ask(f"peak {dtype}"))
            for child in random.sample(children, len(children)):
                child.answers.append(child.ask("step"))
        result: dict[str, Any] = {
            "config": config,
            "threads": options.threads,
            "matmul_flops": {dtype: statistics.median(rates) for dtype, rates in peaks.items()},
            "variants": {child.name: figures(child, children[0], ours, peaks[child.dtype]) for child in children},
        }
        text = [
            f"{ours.tokens} tokens per step, {options.threads} threads, {options.rounds} rounds; {config_line(ours)}"
            f"; best product {statistics.median(peaks[ours.dtype]) / 1e12:.3g} TFLOP/s"
        ]
        text.append(table(result["variants"]))
        text += missing + ours.first["notes"]
        if options.parts:
            result["parts"] = ours.ask("parts")
            text.append(parts_table(result["parts"], statistics.median(a["seconds"] for a in ours.answers)))
        if options.profile is not None:
            text.append(ours.ask(f"profile {options.profile}"))
    finally:
        for child in children:
            if hasattr(child, "process"):
                child.stop()
    return "\n".join(text), result


def config_line(ours: Child) -> str:
    return f"{ours.first['flops_per_token'] / 1e6:.1f} MFLOP per token, {ours.spec['config']['train']['dtype']}"


def quartiles(values: list[float]) -> list[float]:
    """Lower quartile, median, upper quartile."""
    return statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3


def figures(child: Child, base: Child, ours: Child, peaks: list[float]) -> dict[str, Any]:
    seconds = [answer["seconds"] for answer in child.answers]
    flops = (child.first["flops_per_token"] or ours.first["flops_per_token"]) * child.tokens
    base_flops = (base.first["flops_per_token"] or ours.first["flops_per_token"]) * base.tokens
    return {
        "seconds_per_step": quartiles(seconds),
        "tokens_per_second": child.tokens / statistics.median(seconds),
        "seconds_per_token": statistics.median(seconds) / child.tokens,
        "speedup": quartiles([b["seconds"] / s for b, s in zip(base.answers, seconds, strict=True)]),
        "flop_ratio": flops / base_flops,
        "mfu": statistics.median(flops / s / peak for s, peak in zip(seconds, peaks, strict=True)),
        "peak_bytes": child.ask("memory"),
        "losses": child.first["losses"],
    }


def table(rows: dict[str, dict[str, Any]]) -> str:
    heads = f"{'ms/step':>9}{'tokens/s':>10}{'MFU':>7}{'step memory':>13}{'speed-up':>10}{'':14}"
    lines = [f"{'':26}{heads}{'time/FLOP ratio':>16}  first losses"]
    for name, row in rows.items():
        low, median, high = row["speedup"]
        ms, memory = row["seconds_per_step"][1] * 1e3, f"{row['peak_bytes'] / 2**20:.0f} MiB"
        line = f"{name:26}{ms:>9.0f}{row['tokens_per_second']:>10.0f}{row['mfu']:>7.1%}{memory:>13}{median:>9.2f}x"
        line += f" [{low:.2f}, {high:.2f}]{1 / median / row['flop_ratio']:>16.2f}"
        lines.append(line + "  " + " ".join(f"{loss:.5f}" for loss in row["losses"]))
    return "\n".join(lines)


def parts_table(parts: dict[str, float], step: float) -> str:
    rows = {**parts, "the rest": step - sum(parts.values())}
    return "\n".join(f"    {name:24}{seconds * 1e3:>8.1f} ms {seconds / step:>6.1%}" for name, seconds in rows.items())


def loss_memory(config: dict[str, Any], options: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """Each number from a fresh process."""
    result: dict[str, Any] = {}
    train, data, vocab = config["train"], config["data"], config["model"]["vocab_size"]
    lines = [f"loss of 1+D heads, {train['micro_batch_size'] * data['seq_len']} tokens, vocabulary {vocab}"]
    for depths in (0, 1, 2, 4):
        mode = "sequential" if depths else "none"
        mtp = config["mtp"] | {"mode": mode, "num_nextn_predict_layers": depths}
        for kind in ("naive", "chunked"):
            child = Child(kind, {"kind": kind, "config": config | {"mtp": mtp}})
            child.start(options.threads)
            result[f"{kind} D={depths}"] = child.answer()
            child.stop()
        naive, own = (result[f"{kind} D={depths}"] / 2**20 for kind in ("naive", "chunked"))
        lines.append(f"    D={depths}: all logits at once {naive:8.0f} MiB, by chunks {own:6.0f} MiB")
    return "\n".join(lines), result


STARTUP = """
import sys, time
marks = [("python", time.process_time())]
def mark(name): marks.append((name, time.process_time()))
from dsv3_mtp.config import load_config
config = load_config(sys.argv[1], sys.argv[2:]); mark("read the config")
import torch; mark("import torch")
import dsv3_mtp.parallel.launch; mark("import deepspeed")
import dsv3_mtp.trainer; mark("import the rest")
trainer = dsv3_mtp.trainer.Trainer(config, command=["bench"]); mark("process group, data, model, engine")
trainer.log.append = lambda record: None
trainer.optimizer_step(); mark("first step")
trainer.optimizer_step(); mark("second step")
import json, os
print("MARKS", json.dumps(marks), flush=True); os._exit(0)
"""


def startup(options: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """CPU seconds of each phase, medians over the rounds, each round a fresh process on random tokens."""
    import numpy as np

    from dsv3_mtp.data.megatron import write_index

    phases: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        tokens = np.random.default_rng(0).integers(0, 2048, 50_000).astype(np.uint16)
        tokens.tofile(f"{folder}/random.bin")
        write_index(Path(f"{folder}/random.idx"), tokens.dtype, np.array([len(tokens)]))
        for number in range(options.rounds):
            sets = [f"data.train={folder}/random", f"data.val={folder}/random", "data.build=null"]
            sets += [f"run.dir={folder}/runs", f"run.name=r{number}", f"train.threads={options.threads}", *options.sets]
            command = [sys.executable, "-c", STARTUP, options.config, *sets]
            environment = {**os.environ, "PYTHONPATH": python_path()}
            done = subprocess.run(command, capture_output=True, text=True, env=environment)
            line = next((line for line in done.stdout.splitlines() if line.startswith("MARKS ")), None)
            if line is None:
                raise ValueError(f"--startup: {last_words(done.stderr, done.returncode)}")
            before = 0.0
            for name, at in json.loads(line.removeprefix("MARKS ")):
                phases.setdefault(name, []).append(at - before)
                before = at
    medians = {name: statistics.median(times) for name, times in phases.items()}
    total = sum(seconds for name, seconds in medians.items() if name != "second step")
    lines = [f"    {name:40}{seconds:>7.2f} CPU-s" for name, seconds in medians.items()]
    return "\n".join([*lines, f"    {'command to the end of the first step':40}{total:>7.2f} CPU-s"]), medians


if __name__ == "__main__":
    sys.exit(main())
