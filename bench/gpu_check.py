"""Checks on one Hopper GPU what no CPU can: Transformer Engine, FP8 products, attention kernels;
single products only: `dsv3 study --study fp8.yaml` compares the losses of whole runs.

    python bench/gpu_check.py --out gpu_check.md

Writes a report; a part that fails is in it with its error, and the exit code is then 1. Exit code
2: there is no CUDA device.
"""

import argparse
import platform
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

Row = list[object]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", default="gpu_check.md", metavar="FILE", help="default: gpu_check.md"
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
    ]
    from dsv3_mtp.files.atomic import write_text

    command, today = " ".join(["python", *sys.argv]), time.strftime("%Y-%m-%d")
    texts = [f"# GPU results\n\n{torch.cuda.get_device_name()}, {today}, `{command}`"]
    failed = 0
    for title, columns, part in parts:
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

    from dsv3_mtp.ops import te_library
    from dsv3_mtp.precision import te
    from dsv3_mtp.precision.quantise import BLOCK, ROW, quantise

    if te_library.load()[0] is None:
        yield [f"not run: Transformer Engine {te_library.load()[1]}", *[""] * 5]
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


if __name__ == "__main__":
    sys.exit(main())
