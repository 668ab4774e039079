"""Training speed and memory, as ratios from interleaved processes.

Examples:
    python bench/step.py --preset tiny --against transformers         # the same weights and batch
    python bench/step.py --config configs/v3_tiny.yaml --parts        # where the time goes
    python bench/step.py --preset tiny --against depths               # D = 0, 1, 2, 4, of two kinds
    python bench/step.py --config configs/v3_3b.yaml --against fp8    # on a Hopper: both backends
Every variant has a process of its own; in each round each runs one step, in random order. With one
thread of a CPU the times are CPU seconds of the process, so that other work on the machine touches
the ratios little; with more threads, and on a GPU, wall seconds. A ratio is the median of the
rounds' ratios, with its quartiles in brackets. MFU is against the best product of the same round
and dtype. Exit codes: 0 done, 2 wrong options or config, 130 interrupted.
"""

import argparse
import json
import os
import random
import signal
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from child import ROOT, Child, ChildError
from models import SMALL, TINY, theirs, valid
from timing import quartiles, ratios

PRESETS = {
    "tiny": TINY,
    "small": SMALL,
}  # over configs/v3_tiny.yaml, without heads, 8 x 256 tokens per step
AGAINST = ("transformers", "plain", "depths", "fp8")
DEPTHS = [("sequential", d) for d in (1, 2, 4)] + [("parallel", d) for d in (1, 2, 4)]
# Settings that a step here does not follow, and where there is nothing to follow.
LEFT_OUT = {
    "data.mask_documents": False,
    "optim.moments": "float32",
    "train.ema_decay": None,
    "parallel.offload_optimizer": False,
    "parallel.expert_parallel_size": 1,
    "parallel.pipeline_stages": 1,
    "parallel.sequence_parallel_size": 1,
}


def main() -> int:
    sys.path.insert(0, str(ROOT))
    options = parse()
    # not the default, which leaves the children behind
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    os.environ.setdefault("OMP_NUM_THREADS", str(options.threads))
    os.environ.setdefault("GOMP_SPINCOUNT", "100000")  # as `dsv3 train`
    from dsv3_mtp.config import load_config

    sets = options.sets
    if options.preset is not None:
        keys = [f"model.{key}={value}" for key, value in PRESETS[options.preset].items()]
        sets = [*keys, "mtp.mode=none", "train.batch_size=8", "train.micro_batch_size=8", *sets]
    try:
        config = load_config(options.config, sets)
        text, result = compare(config.to_dict(), options)
        print(text)
        write(options, result)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def parse() -> argparse.Namespace:
    from dsv3_mtp.cli.command import add_sets, at_least

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default=str(ROOT / "configs/v3_tiny.yaml"), metavar="YAML")
    add_sets(parser)
    parser.add_argument(
        "--preset", choices=PRESETS, help="a model of 12M or 28M parameters without MTP heads"
    )
    parser.add_argument(
        "--against", nargs="+", default=[], choices=AGAINST, help="what to compare with"
    )
    parser.add_argument(
        "--compile", action="store_true", help="also with every block through torch.compile"
    )
    parser.add_argument(
        "--parts", action="store_true", help="also attention, MoE, loss, optimizer, each alone"
    )
    for key, default in (("rounds", 9), ("threads", 1)):
        parser.add_argument(f"--{key}", type=at_least(1), default=default, metavar="N")
    parser.add_argument(
        "--limit", type=float, default=1800, metavar="S", help="seconds for one step or build"
    )
    parser.add_argument("--json", metavar="FILE", help="write the numbers there as well")
    options = parser.parse_args()
    file = options.json
    if file is not None and (Path(file).is_dir() or not os.access(Path(file).parent, os.W_OK)):
        parser.error(f"--json {file}: must be a file in a folder that is there and can be written")
    rest = [f"--against {name}" for name in dict.fromkeys(options.against) if name != "depths"]
    rest += [f"--{name}" for name in ("compile", "parts") if getattr(options, name)]
    if "depths" in options.against and rest:
        parser.error(
            f"--against depths: measures something of its own; leave out {', '.join(rest)}"
        )
    return options


class Variant(Child):
    """One row of a comparison."""

    def __init__(self, name: str, spec: dict[str, Any], *, limit: float):
        super().__init__(name, "step_child.py", spec, limit=limit)
        self.answers: list[dict[str, float]] = []
        train, data = spec["config"]["train"], spec["config"]["data"]
        self.dtype: str = train["dtype"]
        self.tokens: int = train["micro_batch_size"] * data["seq_len"]

    def hear(self) -> None:
        """Its first answer: the losses of its first steps, FLOPs, notes."""
        self.first: dict[str, Any] = self.answer()


def variants(
    config: dict[str, Any], options: argparse.Namespace
) -> list[tuple[str, dict[str, Any]]]:
    """Name and spec of each; the first one is what the others are compared with."""
    if options.parts and config["train"]["freeze"] == "trunk":
        raise ValueError(
            "--parts: times the backward of every part, "
            "a frozen trunk has none; set train.freeze=none"
        )

    def ours(
        name: str,
        *,
        tuned: bool = True,
        compiled: bool = False,
        section: str = "mtp",
        **changes: Any,
    ) -> tuple[str, dict[str, Any]]:
        changed = valid(name, config | {section: config[section] | changes})
        return name, {"kind": "ours", "config": changed, "tuned": tuned, "compiled": compiled}

    if "depths" in options.against:
        # these heads are not the run's
        config = config | {"mtp": {"loss_weight": config["mtp"]["loss_weight"]}}
        rows = [ours("D=0", mode="none")]
        return rows + [
            ours(f"{mode} D={d}", mode=mode, num_nextn_predict_layers=d) for mode, d in DEPTHS
        ]
    rows = theirs(config) if "transformers" in options.against else []
    if len(rows) > 2:  # in bfloat16 on a CPU
        rows.append(ours("dsv3_mtp float32", section="train", dtype="float32"))
    if "plain" in options.against:
        rows.append(ours("dsv3_mtp without tuning", tuned=False))
    if "fp8" in options.against:
        rows.append(ours("dsv3_mtp", section="fp8", enabled=False))
        for backend in ("te", "torch"):
            rows.append(
                ours(f"dsv3_mtp FP8 by {backend}", section="fp8", enabled=True, backend=backend)
            )
    else:
        rows.append(ours("dsv3_mtp"))
    if options.compile:
        rows.append(ours("dsv3_mtp, compiled", tuned=False, compiled=True))
    return rows


def compare(config: dict[str, Any], options: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """Table and numbers. A variant that fails is left out with the reason; what is compared is then
    the rest.
    """
    children = [Variant(*spec, limit=options.limit) for spec in variants(config, options)]
    missing: list[str] = []

    def each(act: Callable[[Variant], None]) -> None:
        for variant in random.sample(children, len(children)):
            try:
                act(variant)
            except ChildError as error:
                children.remove(variant)
                variant.stop()
                missing.append(f"not run: {error}")

    try:
        each(lambda variant: variant.start(options.threads))
        each(Variant.hear)
        ours = own_row(children, config, missing)
        peaks: dict[str, list[float]] = {child.dtype: [] for child in children}
        for _ in range(options.rounds):
            for dtype, rates in peaks.items():
                rates.append(ours.ask(f"peak {dtype}"))
            each(lambda variant: variant.answers.append(variant.ask("step")))
            ours = own_row(children, config, missing)
            write(options, {child.name: {"steps": child.answers} for child in children})
        result: dict[str, Any] = {
            "config": config,
            "threads": options.threads,
            "matmul_flops": {dtype: statistics.median(rates) for dtype, rates in peaks.items()},
            "variants": {
                child.name: figures(child, children[0], ours, peaks[child.dtype])
                for child in children
            },
        }
        best = statistics.median(peaks[ours.dtype]) / 1e12
        text = [
            f"{ours.tokens} tokens per step, {options.threads} threads, {options.rounds} rounds, "
            f"{ours.first['clock']} seconds; {config_line(ours)}; best product {best:.3g} TFLOP/s",
            table(result["variants"]),
            *missing,
            *ours.first["notes"],
            *left_out(config, options),
        ]
        if options.parts:
            result["parts"] = ours.ask("parts")
            step = statistics.median(a["seconds"] for a in ours.answers)
            text.append(parts_table(result["parts"], step))
    finally:
        for child in children:
            child.stop()
    return "\n".join(text), result


def own_row(children: list[Variant], config: dict[str, Any], missing: list[str]) -> Variant:
    """The first row that runs as `dsv3 train` does: its products and parts are shown.

    Raises:
        ValueError: it is not there any more.
    """
    own = {"kind": "ours", "tuned": True}
    for child in children:
        if own.items() <= child.spec.items() and child.dtype == config["train"]["dtype"]:
            return child
    raise ValueError("\n".join(["nothing of this project's own is left to compare", *missing]))


def write(options: argparse.Namespace, result: dict[str, Any]) -> None:
    """After every round: what was measured is there if the benchmark is stopped."""
    if options.json is not None:
        Path(options.json).write_text(json.dumps(result, indent=2) + "\n")


def left_out(config: dict[str, Any], options: argparse.Namespace) -> list[str]:
    """Lines on what a step of this run has that a step here does not."""
    from dsv3_mtp.config import MTPConfig

    train, notes, defaults = config["train"], list[str](), dict(LEFT_OUT)
    if "depths" in options.against:
        own = MTPConfig().model_dump(exclude={"mode", "num_nextn_predict_layers", "loss_weight"})
        defaults |= {f"mtp.{key}": default for key, default in own.items()}
    keys = [
        name
        for name, default in defaults.items()
        if config[name.split(".")[0]][name.split(".")[1]] != default
    ]
    if keys:
        notes.append(f"not in these steps: {', '.join(keys)}")
    if train["batch_size"] != (micro := train["micro_batch_size"]):
        notes.append(
            f"a step here is one micro-batch of {micro} "
            "rows and an update, not train.batch_size rows"
        )
    return notes


def config_line(ours: Variant) -> str:
    return (
        f"{ours.first['flops_per_token'] / 1e6:.1f} MFLOP "
        f"per token, {ours.spec['config']['train']['dtype']}"
    )


def figures(child: Variant, base: Variant, ours: Variant, peaks: list[float]) -> dict[str, Any]:
    seconds = [answer["seconds"] for answer in child.answers]
    flops = (child.first["flops_per_token"] or ours.first["flops_per_token"]) * child.tokens
    base_flops = (base.first["flops_per_token"] or ours.first["flops_per_token"]) * base.tokens
    return {
        "seconds_per_step": quartiles(seconds),
        "tokens_per_second": child.tokens / statistics.median(seconds),
        "seconds_per_token": statistics.median(seconds) / child.tokens,
        "speedup": ratios([answer["seconds"] for answer in base.answers], seconds),
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
        line = f"{name:26}{ms:>9.0f}{row['tokens_per_second']:>10.0f}{row['mfu']:>7.1%}{memory:>13}"
        line += f"{median:>9.2f}x"
        line += f" [{low:.2f}, {high:.2f}]{1 / median / row['flop_ratio']:>16.2f}"
        lines.append(line + "  " + " ".join(f"{loss:.5f}" for loss in row["losses"]))
    return "\n".join(lines)


def parts_table(parts: dict[str, float], step: float) -> str:
    rows = {**parts, "the rest": step - sum(parts.values())}
    return "\n".join(
        f"    {name:24}{seconds * 1e3:>8.1f} ms {seconds / step:>6.1%}"
        for name, seconds in rows.items()
    )


if __name__ == "__main__":
    sys.exit(main())
