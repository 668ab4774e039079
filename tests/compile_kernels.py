"""Compiles the Triton kernels for GPUs that need not be there, and prints each: a process of its
own,

    python tests/compile_kernels.py 90 100    # compute capabilities

TRITON_INTERPRET must not be set.

A kernel is compiled where it would be launched, so that the functions that launch it decide on
types and sizes.
"""

import sys

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from dsv3_mtp.ops import triton_kernels as kernels
from dsv3_mtp.precision import quantise, triton_grouped, triton_quantise


class NoDriver:
    """What Triton asks before it compiles."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", capability, 32)

    def get_current_device(self) -> int:
        return capability  # of each a device of its own: Triton keeps what it compiled for one

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_instead(self, *args, grid, warmup, **options):
    compiled = launch(self, *args, grid=grid, warmup=True, **options).asm
    # a product whose loads are of single bytes, for want of a known alignment, waits for each
    assert compiled["cubin"] and (self.__name__ != "_grouped" or "cp.async.cg" in compiled["ptx"])
    print(capability, self.__name__)


launch, JITFunction.run = JITFunction.run, compile_instead
rows, width = 8, 256


def made(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.bfloat16)


for capability in map(int, sys.argv[1:]):
    driver.set_active(NoDriver())
    factor = torch.zeros(rows)
    for gates in (None, factor):
        kernels.swiglu(*made(rows, 2 * width).chunk(2, dim=1), gates)
        kernels.swiglu_backward(made(rows, width), *made(2, rows, width), gates)
    for sizes in ((rows, width), (rows, 7168)):
        x, weight = made(*sizes), made(sizes[1])
        for other in (x, None):
            scale = kernels.add_rms_norm(x, other, weight, 1e-6)[2]
            kernels.add_rms_norm_backward(x, other, x, weight, scale, learns=other is not None)
    kernels.sum_rows(made(rows, width), torch.zeros(rows, 6, dtype=torch.int64))
    angles = torch.zeros(2, rows, 32)
    heads = kernels.to_heads(
        made(1, rows, 16, 192), made(1, rows, 16, 256), made(1, rows, 64), angles
    )
    kernels.to_heads_backward(*heads, angles)
    kernels.cross_entropy_(
        made(rows, 5000), torch.zeros(rows, dtype=torch.int64), torch.zeros(rows)
    )
    for groups in (1, 8):
        scores = torch.zeros(2, rows, width, requires_grad=True)
        settings = {"n_group": groups, "topk_group": (groups + 1) // 2, "num_experts_per_tok": 8}
        settings |= {"norm_topk_prob": True, "routed_scaling_factor": 2.5}
        routing = kernels.route(scores, torch.zeros(width), **settings)
        (routing.gates.sum() + routing.share.sum()).backward()
    codes, scales = torch.zeros(2, rows, width, dtype=torch.uint8), torch.ones(2, 1, 2)
    triton_quantise.dequantise(codes, scales, torch.bfloat16)
    if capability < 89:  # no E4M3
        continue
    x, weight = made(256, 256), made(512, 256)
    for tile in (quantise.ROW, quantise.BLOCK):
        triton_quantise.quantise(x, tile, "pow2")
    tiles = triton_quantise.quantise(x, quantise.ROW, "pow2")
    blocks = (
        y.unflatten(0, (2, -1)) for y in triton_quantise.quantise(weight, quantise.BLOCK, "pow2")
    )
    triton_grouped.by_rows(*tiles, *blocks, [128, 128], torch.bfloat16)
    triton_grouped.over_rows(*tiles, *tiles, [128, 128], torch.bfloat16)
