"""Checks on one Hopper GPU what no CPU can: Transformer Engine, FP8 products, attention kernels,
FP8 training.

    python bench/gpu_check.py --out gpu_check.md
    python bench/gpu_check.py --steps 0                      # without the training
    python bench/gpu_check.py --runs bf16 te --steps 200     # only these of its runs

Writes a report; a part that fails is in it with its error, and the exit code is then 1. Exit code
2: there is no CUDA device.
"""

import argparse
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

LIMIT = 3600  # seconds for one training run
Row = list[object]
RUNS = {  # backend of the training comparison -> its settings
    "bf16": ["fp8.enabled=false"],  # first: the others are measured against it
    "te": ["fp8.enabled=true", "fp8.backend=te"],
    "torch": ["fp8.enabled=true", "fp8.backend=torch"],
    "emulate": ["fp8.enabled=true", "fp8.backend=emulate"],
    "bf16_moments": ["fp8.enabled=false", "optim.moments=bfloat16", "train.ema_decay=0.99"],
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", default="gpu_check.md", metavar="FILE", help="default: gpu_check.md"
    )
    parser.add_argument(
        "--config",
        default="configs/v3_small.yaml",
        metavar="YAML",
        help="of the training comparison",
    )
    parser.add_argument("--steps", type=int, default=200, help="of the training comparison")
    parser.add_argument(
        "--runs", nargs="+", choices=RUNS, default=list(RUNS), help="of the training comparison"
    )
    args = parser.parse_args()

    import torch

    if not torch.cuda.is_available():
        print(
            "gpu_check: there is no CUDA device; nothing was run and nothing was written",
            file=sys.stderr,
        )
        return 2
    parts: list[tuple[str, Row, Callable[[], Iterator[Row]]]] = [
        ("Environment", ["what", "value"], environment),
        (
            "Quantiser: bytes equal to Transformer Engine's",
            ["shape", "type", "tile", "scale", "codes", "scales"],
            quantisers,
        ),
        (
            "Linear layers against float64",
            ["backend", "tokens x in x out", "y", "dx", "dW"],
            linears,
        ),
        (
            "Grouped experts against float64",
            ["backend", "rows of the experts", "y", "dx", "dW"],
            experts,
        ),
        (
            "Attention core at (192, 128) against float32",
            ["kernel", "forward", "dq", "dk", "dv", "ms"],
            attention,
        ),
        (
            f"Training, {args.steps} steps",
            RUN_COLUMNS,
            lambda: training(args.config, args.steps, args.runs),
        ),
    ]
    from dsv3_mtp.files.atomic import write_text

    command, today = " ".join(["python", *sys.argv]), time.strftime("%Y-%m-%d")
    texts = [f"# GPU results\n\n{torch.cuda.get_device_name()}, {today}, `{command}`"]
    failed = 0
    for title, columns, part in parts if args.steps else parts[:-1]:
        text, error = run(columns, part)
        failed += error
        texts.append(f"## {title}\n\n{text}")
        print(texts[-1], flush=True)
        write_text(Path(args.out), "\n\n".join(texts) + "\n")  # as they come
    return int(failed > 0)


def run(columns: Row, part: Callable[[], Iterator[Row]]) -> tuple[str, bool]:
    """A part's table, and whether it failed; the rows before the failure stay."""
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in (columns, ["---"] * len(columns))]
    try:
        for row in part():
            lines.append(
                "| "
                + " | ".join(f"{x:.3g}" if isinstance(x, float) else str(x) for x in row)
                + " |"
            )
    except Exception:
        return "\n".join(
            lines
        ) + f"\n\nFAILED:\n\n```\n{traceback.format_exc().rstrip()}\n```", True
    return "\n".join(lines), False


def environment() -> Iterator[Row]:
    import torch

    from dsv3_mtp.precision import hopper, te

    device = torch.device("cuda")
    yield ["device", torch.cuda.get_device_name()]
    yield ["compute capability", ".".join(map(str, torch.cuda.get_device_capability()))]
    yield ["python, torch, CUDA, cuDNN", f"{platform.python_version()}, "
        f"{torch.__version__}, {torch.version.cuda}, "
           f"{torch.backends.cudnn.version()}"]  # fmt: skip
    yield ["fp8.backend: te", te.unsupported(device) or "runs"]
    yield ["fp8.backend: torch", hopper.unsupported(device) or "runs"]


def quantisers() -> Iterator[Row]:
    import torch

    from dsv3_mtp.precision import te
    from dsv3_mtp.precision.quantise import BLOCK, ROW, quantise

    if te.load()[0] is None:
        yield [f"not run: Transformer Engine {te.load()[1]}", *[""] * 5]
        return
    for shape in ((256, 512), (1000, 576), (129, 272)):
        for dtype in (torch.bfloat16, torch.float32):
            x = torch.randn(shape, device="cuda", dtype=dtype)
            x[0] *= 1e4
            x[:, :128] = 0
            for tile in (ROW, BLOCK):
                for scale in ("pow2", "fp32"):
                    codes, scale_inv = quantise(x, tile, scale)
                    their_codes, their_scale = te.quantise(x, tile, scale)
                    ours, theirs = (codes.view(torch.uint8), scale_inv), (their_codes, their_scale)
                    same = map(verdict, ours, theirs)
                    yield [list(shape), str(dtype)[6:], tile, scale, *same]


def verdict(ours, theirs) -> str:
    different = int((ours != theirs[: ours.shape[0], : ours.shape[1]]).sum())
    return "equal" if not different else f"{different} of {ours.numel()} differ"


def backends():
    """(name, linear(weight) -> layer, grouped) of every backend that runs here."""
    import torch

    from dsv3_mtp.precision import hopper, te
    from dsv3_mtp.precision.emulate import Emulated
    from dsv3_mtp.precision.linear import FP8Linear, Recipe

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    yield "high", lambda linear: linear, None
    for name, product in (("emulate", Emulated()), ("torch", hopper.ScaledMM())):
        if name == "emulate" or hopper.unsupported(device) is None:
            recipe = Recipe(product)
            yield (
                name,
                lambda linear, recipe=recipe: with_weight(FP8Linear, linear, recipe),
                recipe.grouped_linear,
            )
    if te.unsupported(device) is None:
        grouped = te.TEGroupedLinear("pow2")
        yield "te", lambda linear: with_weight(te.TELinear, linear, "pow2"), grouped


def with_weight(kind, linear, how):
    """A layer of this kind with the weight of a linear one."""
    layer = kind(linear.in_features, linear.out_features, how)
    layer.weight = linear.weight
    return layer


def relative(ours, exact) -> float:
    return float((ours.double() - exact).norm() / exact.norm())


def linears() -> Iterator[Row]:
    import torch
    from torch import nn

    for tokens, width, out in ((512, 512, 512), (1000, 7168, 576), (4096, 2048, 1536)):
        linear = nn.Linear(width, out, bias=False, device="cuda", dtype=torch.bfloat16)
        x, grad = (
            torch.randn(tokens, n, device="cuda", dtype=torch.bfloat16) for n in (width, out)
        )
        weight = linear.weight.detach().double()
        exact = x.double() @ weight.T, grad.double() @ weight, grad.double().T @ x.double()
        for name, build, _ in backends():
            a = x.clone().requires_grad_()
            linear.weight.grad = None
            y = build(linear)(a)
            y.backward(grad)
            errors = [
                relative(ours, e)
                for ours, e in zip((y, a.grad, linear.weight.grad), exact, strict=True)
            ]
            yield [name, f"{tokens} x {width} x {out}", *errors]


def experts() -> Iterator[Row]:
    import torch

    counts = [300, 0, 17, 707]
    x, grad = (torch.randn(1024, n, device="cuda", dtype=torch.bfloat16) for n in (512, 256))
    weight = torch.randn(4, 256, 512, device="cuda", dtype=torch.bfloat16)
    parts = list(
        zip(x.double().split(counts), weight.double(), grad.double().split(counts), strict=True)
    )
    exact = (
        torch.cat([rows @ w.T for rows, w, _ in parts]),
        torch.cat([g @ w for _, w, g in parts]),
        torch.stack([g.T @ rows for rows, _, g in parts]),
    )
    for name, _, grouped in backends():
        if grouped is not None:
            a, w = x.clone().requires_grad_(), weight.clone().requires_grad_()
            y = grouped(a, w, counts)
            y.backward(grad)
            yield [
                name,
                counts,
                *(relative(o, e) for o, e in zip((y, a.grad, w.grad), exact, strict=True)),
            ]


def attention() -> Iterator[Row]:
    import torch
    from timing import now

    from dsv3_mtp.ops.attention import sdpa
    from dsv3_mtp.ops.cores import choose_attention

    heads, length, scale = 16, 2048, 192**-0.5
    # Numbers that bfloat16 has: the errors are those of the kernels alone.
    wide = [
        torch.randn(2, heads, length, n, device="cuda").bfloat16().float() for n in (192, 192, 128)
    ]
    grad = torch.randn(2, heads, length, 128, device="cuda").bfloat16().float()
    exact = forward_backward(sdpa, wide, grad, scale)
    for name in ("fa4", "fa3", "fa2", "te", "sdpa"):
        try:
            core, _ = choose_attention(name, heads=heads, widths=(192, 128), dtype=torch.bfloat16,
                                       device=torch.device("cuda"), masked=False)  # fmt: skip
        except ValueError as error:
            yield [name, str(error).splitlines()[0], "", "", "", ""]
            continue
        inputs, upstream = [x.bfloat16() for x in wide], grad.bfloat16()
        found = forward_backward(core, inputs, upstream, scale)
        device = torch.device("cuda")
        start = now(device)
        for _ in range(20):
            forward_backward(core, inputs, upstream, scale)
        seconds = now(device) - start
        errors = [relative(ours, e.double()) for ours, e in zip(found, exact, strict=True)]
        yield [name, *errors, seconds * 50]


def forward_backward(core, inputs, grad, scale):
    query, key, value = (x.clone().requires_grad_() for x in inputs)
    out = core(query, key, value, scale, None)
    out.backward(grad)
    return out, query.grad, key.grad, value.grad


RUN_COLUMNS: Row = [
    "precision",
    "main loss",
    "error to bf16, last quarter",
    "largest",
    "MTP loss",
    "error",
    "largest",
    "tokens/s",
    "MFU",
    "GiB",
]


def training(config: str, steps: int, names: list[str]) -> Iterator[Row]:
    """The same data and seed in every precision; V3 appendix B.1 compares losses smoothed with EMA
    0.9.
    """
    from dsv3_mtp.report.metrics import read_metrics
    from dsv3_mtp.study.measure import curves_of, loss_error_metrics, smoothed

    runs: dict[str, list[dict]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            options = [
                f"run.name={name}",
                f"run.dir={folder}",
                "log.every=1",
                "eval.every=0",
                "attention.backend=sdpa",
            ]
            options += [
                "data.train=data/pystdlib-2048",
                "data.val=data/pystdlib-2048",
                "data.build=pystdlib",
            ]
            options += [
                "model.vocab_size=2048",
                f"train.total_tokens={steps * 32 * 1024}",
                "data.seq_len=1024",
            ]
            options += [
                "train.batch_size=32",
                "train.micro_batch_size=32",
                "train.dtype=bfloat16",
                *RUNS[name],
            ]
            options += ["eval.batches=1", "log.tensorboard=false"]
            command = [sys.executable, "-m", "dsv3_mtp", "train", "--config", config]
            command += [part for option in options for part in ("--set", option)]
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT)
            except subprocess.TimeoutExpired:
                yield [name, f"not finished after {LIMIT} s", *[""] * 8]
                continue
            if done.returncode:
                why = done.stderr.strip().splitlines()[-1:]
                yield [name, f"exit code {done.returncode}: {why}", *[""] * 8]
                continue
            shutil.rmtree(Path(folder) / name / "checkpoints")  # gigabytes each
            runs[name] = [
                r for r in read_metrics(Path(folder) / name / "metrics.jsonl") if "train/loss" in r
            ]
            row: Row = [name]
            curves = {n: curves_of(runs[n], every_loss=True) for n in (name, "bf16") if n in runs}
            reference, end = curves.get("bf16", curves[name]), runs[name][-1]["tokens"]
            errors = loss_error_metrics(curves[name], reference, total_tokens=end)
            for key in ("train/main_loss", "train/mtp_loss/1"):
                row.append(smoothed([r[key] for r in runs[name]])[-1])
                row.append(f"{errors[key.replace('_loss', '_loss_error')]:.3f} %")
                row.append(f"{errors.get(key.replace('_loss', '_loss_error_max'), 0.0):.3f} %")
            speeds = [r["perf/tokens_per_s"] for r in runs[name][len(runs[name]) // 2 :]]
            yield [
                *row,
                sorted(speeds)[len(speeds) // 2],
                runs[name][-1].get("perf/mfu", ""),
                runs[name][-1].get("perf/peak_gib", ""),
            ]
    if missing := set(names) - runs.keys():
        raise RuntimeError(f"did not train: {', '.join(sorted(missing))}")


if __name__ == "__main__":
    sys.exit(main())
