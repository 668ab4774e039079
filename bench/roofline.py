"""What a micro-batch's forward and backward launch on a GPU, and the least time that takes.

Without a GPU: its paths run on tensors without storage, and every operation's bytes and FLOPs are
counted.

    python bench/roofline.py --config configs/v3_3b.yaml
    python bench/roofline.py --config configs/v3_16b.yaml --ranks 8     # experts over 8 ranks

An estimate: each operation takes the longer of its bytes and its FLOPs at the rates below. Needs
triton, whose kernels are counted where they would be launched.
"""

import argparse
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from math import comb
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from triton.runtime.jit import JITFunction

from dsv3_mtp.config import Config, load_config
from dsv3_mtp.model.causal_lm import DeepseekV3MTP, meta_model
from dsv3_mtp.model.output import LossSettings
from dsv3_mtp.model.size import model_size
from dsv3_mtp.ops import choice, cross_entropy, experts, triton_kernels
from dsv3_mtp.ops.attention import sdpa
from dsv3_mtp.ops.compute import Compute, building
from dsv3_mtp.parallel import private
from dsv3_mtp.parallel.experts import local_experts
from dsv3_mtp.report.metrics import mfu

# One H200: 790 TFLOP/s is what large bfloat16 products reach; EFFICIENCY is what layers reached of
# that on an H100
GPU = "NVIDIA H200"
RATE, BANDWIDTH, LINK = 790e12, 4.3e12 * 0.75, 300e9
EFFICIENCY = {"products": 0.85, "grouped": 0.80, "attention": 0.52, "float32": 0.06}
LATENCY = 2e-6  # of the shortest kernel behind another
FREE = ("empty", "new_empty", "detach", "alias", "lift")  # launch nothing


class Count(TorchDispatchMode):
    """Launches, and seconds by kind, of what runs inside."""

    def __init__(self) -> None:
        super().__init__()
        self.launches, self.in_loss = Counter[str](), False
        self.seconds, self.flops = defaultdict[str, float](float), 0.0

    def add(self, kind: str, moved: float, flops: float = 0.0, rate: float = 1.0) -> None:
        kind = "head, loss" if self.in_loss else kind
        self.launches[kind] += 1
        self.flops += flops
        self.seconds[kind] += max(moved / BANDWIDTH, flops / (RATE * rate), LATENCY)

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        result = operator(*args, **(kwargs or {}))
        given = {tensor.untyped_storage()._cdata for tensor in _tensors((args, kwargs))}
        made = [tensor.untyped_storage()._cdata for tensor in _tensors(result)]
        name, mutable = str(operator).removeprefix("aten."), operator._schema.is_mutable
        if name.startswith(FREE) or (set(made) <= given and not mutable):  # a view
            return result
        flops, kind = 0.0, "passes"
        if name.startswith("_grouped_mm"):  # rows of each expert, or their sum over rows
            flops, kind = 2.0 * args[0].numel() * args[1].shape[-1], "grouped"
        elif (counter := flop_registry.get(operator.overloadpacket)) is not None:
            flops, kind = float(counter(*args, out_val=result)), "products"
        rate = EFFICIENCY.get(kind, 1.0)
        if flops and next(_tensors(result)).dtype == torch.float32 == args[0].dtype:
            rate = EFFICIENCY["float32"]
        self.add(kind, _nbytes((args, result)), flops, rate)
        return result


class Attention(torch.autograd.Function):
    """cuDNN's, of (B, H, T, .): half of each square of T, forward and twice and a half backward."""

    @staticmethod
    def forward(ctx: Any, count: Count, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.count = count
        batch, heads, length, width = query.shape
        ctx.flops = float(batch * heads * length**2 * (width + value.shape[-1]))
        count.add("attention", 2 * _nbytes([query, key, value]), ctx.flops, EFFICIENCY["attention"])
        return torch.empty_like(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        tensors = ctx.saved_tensors
        moved, rate = 3 * _nbytes(list(tensors)), EFFICIENCY["attention"]
        ctx.count.add("attention", moved, 2.5 * ctx.flops, rate)
        return None, *map(torch.empty_like, tensors)


class Norm(torch.autograd.Function):
    """torch's fused RMSNorm."""

    @staticmethod
    def forward(ctx: Any, count: Count, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.count = count
        count.add("passes", 2 * _nbytes(x))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        ctx.count.add("passes", 3 * _nbytes(grad))
        ctx.count.add("passes", _nbytes(grad) / 64)  # of the weight, from partial sums
        return None, *map(torch.empty_like, ctx.saved_tensors)


class Done:
    def wait(self) -> None:
        pass


@contextmanager
def as_on_a_gpu(count: Count, config: Config, ranks: int) -> Iterator[None]:
    """Inside, tensors without storage take a GPU's paths."""
    model = config.model

    def launch(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        times = 3 if "cross_entropy" in kernel.__name__ else 1  # reads its logits twice
        count.add("passes", times * _nbytes(args))

    def all_to_all(out: Tensor, x: Tensor, *sizes: Any, group: Any, async_op: bool = False) -> Done:
        count.launches["all-to-all"] += 1
        count.seconds["all-to-all"] += _nbytes(x) * (ranks - 1) / ranks / LINK
        return Done()

    def tolist(sizes: Tensor) -> list:  # of an even routing: rows and choices for each rank
        count.launches["host waits"] += 1
        tokens, top_k = (
            config.train.micro_batch_size * config.data.seq_len,
            model.num_experts_per_tok,
        )
        experts, local = model.n_routed_experts, model.n_routed_experts // ranks
        visits = 1 - comb(experts - local, top_k) / comb(experts, top_k)
        return [[[round(tokens * visits), tokens * top_k // ranks]] * ranks] * 2

    loss = cross_entropy._LinearCrossEntropy.forward

    def in_loss(*args: Any) -> Any:
        count.in_loss = True
        result = loss(*args)
        count.in_loss = False
        return result

    def attend(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        return Attention.apply(count, q, k, v)

    with ExitStack() as stack:
        for target, name, value in (
            (Tensor, "is_cuda", property(lambda tensor: True)),
            (Tensor, "tolist", tolist),
            (F, "scaled_dot_product_attention", attend),
            (cross_entropy._LinearCrossEntropy, "forward", staticmethod(in_loss)),
            (F, "rms_norm", lambda x, shape, weight, eps: Norm.apply(count, x, weight)),
            (experts, "grouped_kernel", lambda *tensors: True),
            (choice, "kernels", lambda *tensors: triton_kernels),
            (JITFunction, "run", launch),
            (dist, "all_to_all_single", all_to_all),
            (private, "make_expert_groups", lambda size, stages: None),
            (private, "expert_group", lambda name: (None, 0)),
        ):
            stack.enter_context(patch.object(target, name, value))
        yield


def measure(config: Config, ranks: int) -> Count:
    """A micro-batch's forward and backward; experts over `ranks`."""
    count = Count()
    with as_on_a_gpu(count, config, ranks):
        compute = Compute(core=sdpa, recompute=config.train.activation_checkpointing)
        if ranks > 1:
            compute = replace(compute, experts=local_experts(ranks))
        with building(compute), torch.device("meta"):
            model = DeepseekV3MTP(config.model, config.mtp)
        for parameter in model.parameters():
            parameter.data = parameter.data.bfloat16()
        width = config.data.seq_len + 1 + config.mtp.depths
        tokens = torch.empty(config.train.micro_batch_size, width, dtype=torch.int64, device="meta")
        with count:
            out = model(tokens, settings=LossSettings(balance_loss_weight=1e-4))
            out.loss.backward()
    return count


def utilisation(config: Config, seconds: float) -> float:
    """MFU of a micro-batch in `seconds` as a run logs it: what is computed again does not count."""
    size = model_size(meta_model(config.model, config.mtp), config.data.seq_len)
    tokens = config.train.micro_batch_size * config.data.seq_len
    share = mfu(tokens / seconds, size.flops_per_token, GPU, 1)
    assert share is not None
    return share


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--config", required=True)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--ranks", type=int, default=1, help="that share a layer's experts")
    args = parser.parse_args()
    config = load_config(args.config, args.set)
    count = measure(config, args.ranks)
    total, layers = sum(count.seconds.values()), config.model.num_hidden_layers
    share = utilisation(config, total)
    print("| | launches | ms |\n|---|---|---|")
    for kind in sorted(count.launches, key=lambda kind: -count.seconds[kind]):
        print(f"| {kind} | {count.launches[kind]} | {1e3 * count.seconds[kind]:.1f} |")
    launches = count.launches.total() - count.launches["host waits"]
    print(f"| all | {launches} | {1e3 * total:.1f} |\n\nMFU {share:.1%} of {GPU}; {layers} layers")


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, tuple | list | dict):
        for branch in tree.values() if isinstance(tree, dict) else tree:
            yield from _tensors(branch)


def _nbytes(tree: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in _tensors(tree))


if __name__ == "__main__":
    main()
