"""Single products and passes at the sizes of a model's layer: bfloat16, FP8, attention kernels,
Triton and torch.

    python bench/kernels.py                                      # configs/v3_3b.yaml, 16384 tokens
    python bench/kernels.py --config configs/v3_671b.yaml linear experts
    python bench/kernels.py --config configs/v3_nano.yaml --tokens 256 linear    # on a CPU

Variants take turns; every row is the median of the rounds, forward and backward. What cannot run
here says why.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gpu_check import backends
from timing import interleave

from dsv3_mtp import Config, load_config
from dsv3_mtp.ops import choice, rotary, swiglu
from dsv3_mtp.ops import cross_entropy as losses
from dsv3_mtp.ops import experts as dispatch
from dsv3_mtp.ops.attention import Core
from dsv3_mtp.ops.cores import choose_attention
from dsv3_mtp.ops.norm import add_rms_norm
from dsv3_mtp.precision.convert import UNSUPPORTED
from dsv3_mtp.precision.hopper import ScaledMM
from dsv3_mtp.precision.linear import Product, Recipe

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
Variants = dict[str, Callable[[], object]]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; default: all"
    )
    parser.add_argument("--config", default="configs/v3_3b.yaml", metavar="YAML")
    parser.add_argument("--set", action="append", default=[], dest="sets", metavar="a.b=c")
    parser.add_argument("--tokens", type=int, default=16384, help="default: 16384")
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args()
    if unknown := set(options.parts) - PARTS.keys():
        parser.error(f"no such part: {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    if options.rounds < 1:
        parser.error(f"--rounds {options.rounds}: must be at least 1")
    try:
        config = load_config(options.config, options.sets)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.tokens < config.data.seq_len or options.tokens % config.data.seq_len:
        parser.error(
            f"--tokens {options.tokens}: must be a multiple of data.seq_len = {config.data.seq_len}"
        )
    name = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}, {options.tokens} tokens, {options.config}")
    if DEVICE.type == "cuda":
        print(choice.describe(DEVICE))
    for backend, unsupported in UNSUPPORTED.items():
        if reason := unsupported(DEVICE):
            print(f"fp8.backend: {backend} {reason}")
    for part in options.parts or PARTS:
        for title, flops, variants in PARTS[part](config, options.tokens):
            compare(title, flops, variants, options.rounds)
    return 0


def compare(title: str, flops: float | None, variants: Variants, rounds: int) -> None:
    times = interleave(variants, rounds, DEVICE, warm=2)  # they load and compile
    base: float | None = None
    for name, seconds in times.items():
        middle = statistics.median(seconds)
        base = base or middle
        rate = "" if flops is None else f"{flops / middle / 1e12:8.3g} TFLOP/s"
        print(f"{title:42}{name:20}{middle * 1e3:9.3f} ms{rate}{base / middle:8.2f}x", flush=True)


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=torch.bfloat16)


def linear(config: Config, tokens: int):
    shape = config.model
    query = shape.num_attention_heads * (shape.qk_nope_head_dim + shape.qk_rope_head_dim)
    for width, out in (
        (shape.q_lora_rank or shape.hidden_size, query),
        (shape.hidden_size, shape.intermediate_size),
    ):
        weights = nn.Linear(width, out, bias=False, device=DEVICE, dtype=torch.bfloat16)
        x, grad = numbers(tokens, width).requires_grad_(), numbers(tokens, out)

        def run(layer: nn.Module, x: Tensor = x, grad: Tensor = grad) -> None:
            # backward() would add up gradients as well
            torch.autograd.grad(layer(x), (x, *layer.parameters()), grad)

        variants: Variants = {name: partial(run, build(weights)) for name, build, _ in backends()}
        yield f"linear {width} x {out}", 6.0 * tokens * width * out, variants


class OneByOne(ScaledMM):
    """`fp8.backend: torch` with a product by cuBLAS for each expert, in place of one kernel."""

    grouped, grouped_over_rows = Product.grouped, Product.grouped_over_rows


def experts(config: Config, tokens: int):
    """The gate and up products of the routed experts, equally many rows for each."""
    shape = config.model
    rows, groups = tokens * shape.num_experts_per_tok, shape.n_routed_experts
    width, out = shape.hidden_size, 2 * shape.moe_intermediate_size
    x, weight, grad = numbers(rows, width), numbers(groups, out, width), numbers(rows, out)
    counts = [rows // groups + (group < rows % groups) for group in range(groups)]
    held = torch.tensor(counts, device=DEVICE) if dispatch.grouped_kernel(x, weight) else counts

    def high() -> None:
        dispatch.grouped(x, weight, held)
        dispatch.grouped_input_grad(grad, weight, held)
        dispatch.grouped_weight_grad(grad, x, held)

    def low(grouped: Callable[..., Tensor]) -> None:
        torch.autograd.grad(
            grouped(x.requires_grad_(), weight.requires_grad_(), counts), (x, weight), grad
        )
        x.requires_grad_(False), weight.requires_grad_(False)

    variants: Variants = {
        name: partial(low, grouped) if grouped else high for name, _, grouped in backends()
    }
    if "torch" in variants:
        variants["torch, a call each"] = partial(low, Recipe(OneByOne()).grouped_linear)
    yield f"{groups} experts, {rows} rows, {width} x {out}", 6.0 * rows * width * out, variants


def attention_core(config: Config, tokens: int):
    shape, length = config.model, config.data.seq_len
    heads, qk, v = (
        shape.num_attention_heads,
        shape.qk_nope_head_dim + shape.qk_rope_head_dim,
        shape.v_head_dim,
    )
    sizes = [(tokens // length, length, heads, width) for width in (qk, qk, v, v)]
    query, key, value, grad = (numbers(*size).transpose(1, 2).requires_grad_() for size in sizes)

    def run(core: Core) -> None:
        torch.autograd.grad(
            core(query, key, value, qk**-0.5, None), (query, key, value), grad.detach()
        )

    variants: Variants = {}
    for name in ("sdpa", "te", "fa4", "fa3", "fa2"):
        try:
            core, _ = choose_attention(
                name, heads=heads, widths=(qk, v), dtype=torch.bfloat16, device=DEVICE, masked=False
            )
        except ValueError as error:
            print(str(error).splitlines()[0])
            continue
        assert core is not None
        variants[name] = partial(run, core)
    yield (
        f"attention ({qk}, {v}), {heads} heads, T = {length}",
        3.5 * tokens * heads * length * (qk + v),
        variants,
    )


def passes(config: Config, tokens: int):
    """What lies between the products, forward and backward, by Triton (None: it is not used here)
    and by torch.
    """
    shape, length = config.model, config.data.seq_len
    rows, width = tokens * shape.num_experts_per_tok, shape.moe_intermediate_size
    gate_up, gates = numbers(rows, 2 * width).requires_grad_(), numbers(rows).float()
    gates, grad = gates.requires_grad_(), numbers(rows, width)
    nope, rope, v = shape.qk_nope_head_dim, shape.qk_rope_head_dim, shape.v_head_dim
    sizes = (tokens // length, length, shape.num_attention_heads)
    query, kv = (
        numbers(*sizes, nope + rope).requires_grad_(),
        numbers(*sizes, nope + v).requires_grad_(),
    )
    k_rope, angles = (
        numbers(*sizes[:2], rope).requires_grad_(),
        torch.randn(2, length, rope // 2, device=DEVICE),
    )
    out, slots = (
        numbers(rows, shape.hidden_size),
        torch.randperm(rows, device=DEVICE).view(tokens, -1),
    )
    gate, up = (numbers(tokens, shape.intermediate_size).requires_grad_() for _ in range(2))

    x, added, slope = (numbers(tokens, shape.hidden_size) for _ in range(3))
    norm = x.requires_grad_(), added.requires_grad_(), numbers(shape.hidden_size).requires_grad_()

    def residual() -> None:
        total, y = add_rms_norm(*norm, shape.rms_norm_eps)
        torch.autograd.grad((total, y), norm, (slope, slope))

    def heads() -> None:
        parts = rotary.to_heads(query, kv, k_rope, angles)
        torch.autograd.grad(parts, (query, kv, k_rope), [part.detach() for part in parts])

    yield from both(
        {
            "experts' SwiGLU": lambda: torch.autograd.grad(
                swiglu.gated_swiglu(gate_up, gates), (gate_up, gates), grad
            ),
            "dense SwiGLU": lambda: torch.autograd.grad(
                swiglu.swiglu(gate, up), (gate, up), gate.detach()
            ),
            "rows of experts to tokens": lambda: dispatch.combine(out, slots),
            "rotary heads": heads,
            "residual and norm": residual,
        }
    )


def loss(config: Config, tokens: int):
    shape = config.model
    hidden = numbers(tokens, shape.hidden_size).requires_grad_()
    weight = (numbers(shape.vocab_size, shape.hidden_size) * 0.02).requires_grad_()
    targets = torch.randint(shape.vocab_size, (tokens,), device=DEVICE)
    row_weight = torch.full((tokens,), 1 / tokens, device=DEVICE)

    def naive() -> None:
        torch.autograd.grad(F.cross_entropy((hidden @ weight.T).float(), targets), (hidden, weight))

    def chunked() -> None:
        out = losses.linear_cross_entropy(hidden, weight, targets, row_weight)[0]
        torch.autograd.grad(out, (hidden, weight))

    yield from both({"head and loss, by chunks": chunked})
    yield (
        "head and loss, all logits at once",
        6.0 * tokens * shape.hidden_size * shape.vocab_size,
        {"torch": naive},
    )


def both(functions: Variants):
    for title, function in functions.items():

        def plain(function: Callable[[], object] = function) -> None:
            with choice.plain():
                function()

        there = DEVICE.type == "cuda" and choice.triton()[0] is not None
        yield title, None, {"torch": plain} | ({"Triton": function} if there else {})


PARTS = {
    "linear": linear,
    "experts": experts,
    "attention": attention_core,
    "passes": passes,
    "loss": loss,
}

if __name__ == "__main__":
    sys.exit(main())
