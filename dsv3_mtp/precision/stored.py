"""Weights that stay in block-FP8 as a checkpoint stores them: those of a frozen trunk.

    with building(stored(compute)):
        model = DeepseekV3MTP(config, mtp)

A projection, or the experts of a layer, then holds codes where its weight would be, under the same
name and in the same shape, and in a buffer beside them the scales of their 128 x 128 blocks. What
they stand for is made for one product, in the type of its rows, and forgotten: code times scale in
float32, rounded once, which is what a model that is loaded in that type holds. So the same bits
come out. The heads learn, and have weights as ever.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from dsv3_mtp.files.fragments import Fragments
from dsv3_mtp.ops import c, choice
from dsv3_mtp.ops.compute import Compute, Kind
from dsv3_mtp.precision.linear import Blocks, FP8Linear
from dsv3_mtp.precision.quantise import BLOCK, EDGE, dequantise, scale_shape

SCALE = "_scale_inv"  # behind the name of the codes, as on disk


def stored(compute: Compute) -> Compute:
    """`compute` for a model whose trunk stays in block-FP8."""

    def linear(kind: Kind, inputs: int, outputs: int) -> Any:
        return StoredLinear(partial(compute.linear, kind, inputs, outputs), inputs, outputs)

    return replace(compute, linear=linear, stack=put, heads=compute.heads or compute)


def put(layer: nn.Module, name: str, shape: tuple[int, ...], parts: int | None = None) -> None:
    """Puts codes (..., rows, columns) into a layer, and their scales (..., rows/128, columns/128);
    (..., parts, rows/parts/128, columns/128) where `rows` are those of several matrices, one below
    the other, each with blocks of its own.
    """
    # As bytes: no collective knows E4M3, and ZeRO-3 would make numbers of a floating type its own.
    codes = nn.Parameter(torch.empty(shape, dtype=torch.uint8), requires_grad=False)
    layer.register_parameter(name, codes)
    *stack, rows, columns = shape
    blocks = scale_shape((rows // (parts or 1), columns))
    each = () if parts is None else (parts,)
    layer.register_buffer(name + SCALE, torch.empty(*stack, *each, *blocks, dtype=torch.float32))


def is_codes(weight: Tensor) -> bool:
    """Whether a layer's parameter was made by `put`."""
    return weight.dtype == torch.uint8


class StoredLinear(nn.Module):
    """A projection that is made for its product, and multiplies as the one that `make` makes."""

    def __init__(self, make: Callable[[], nn.Linear], inputs: int, outputs: int):
        super().__init__()
        self.make = make
        self.inner: tuple[nn.Linear, ...] = ()
        put(self, "weight", (outputs, inputs))
        self.weight: Tensor

    def forward(self, x: Tensor) -> Tensor:
        if not self.inner:  # not before: ZeRO-3 would shard it as one of the model's own
            with torch.device("meta"):
                self.inner = (self.make(),)  # no submodule: it has no weight of its own
        inner = self.inner[0]
        if isinstance(inner, FP8Linear):  # which multiplies the codes themselves
            assert not (torch.is_grad_enabled() and x.requires_grad), "blocks have no backward"
            codes = self.weight.detach().view(torch.float8_e4m3fn)
            return inner.recipe.linear(x, Blocks(codes, getattr(self, "weight" + SCALE)))
        return functional_call(inner, {"weight": weight_of(self, "weight", x.dtype)}, (x,))


@dataclass(frozen=True)
class StoredExperts:
    """The weights of a layer's experts (ops/experts.py: `Stack`)."""

    codes: Tensor  # (E, rows, columns)
    scale_inv: Tensor  # (E, parts, rows/parts/128, columns/128)
    dtype: torch.dtype

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape

    def __getitem__(self, expert: int) -> Tensor:
        return numbers(self.codes[expert], self.scale_inv[expert], self.dtype)

    def whole(self) -> Tensor:
        return numbers(self.codes, self.scale_inv, self.dtype)

    def blocks(self) -> tuple[Tensor, Tensor] | None:
        parts = self.scale_inv.shape[1]
        if parts > 1 and self.shape[1] // parts % EDGE:
            return None
        return self.codes.view(torch.float8_e4m3fn), self.scale_inv.flatten(1, 2)


def kept(layer: nn.Module, name: str, dtype: torch.dtype) -> Tensor | StoredExperts:
    """What the routed experts multiply with: the layer's own weights, or what makes them."""
    weight = getattr(layer, name)
    if not is_codes(weight):
        return weight
    return StoredExperts(weight.detach(), getattr(layer, name + SCALE), dtype)


def weight_of(layer: nn.Module, name: str, dtype: torch.dtype) -> Tensor:
    """The layer's own weight, or what its codes stand for in `dtype`."""
    weight = getattr(layer, name)
    if not is_codes(weight):
        return weight
    return numbers(weight.detach(), getattr(layer, name + SCALE), dtype)


class StoredMatrices:
    """The codes and scales of one name in a checkpoint, matrix by matrix."""

    def __init__(self, folder: Fragments, name: str):
        self.folder, self.name = folder, name
        shape, blocks = folder.shapes[name], folder.shapes[name + SCALE]
        parts = blocks[-3] if len(blocks) > len(shape) else 1
        self.shape = shape[-2] // parts, shape[-1]  # of each
        self.blocks = blocks[-2:]
        self.count = math.prod(shape[:-2]) * parts

    def __getitem__(self, number: int) -> Tensor:
        """What the codes of this matrix stand for, (rows, columns) float32."""
        codes = self._read(self.name, number, self.shape)
        return dequantise(codes, self._read(self.name + SCALE, number, self.blocks), BLOCK)

    def _read(self, name: str, number: int, shape: tuple[int, ...]) -> Tensor:
        size = math.prod(shape)
        return self.folder.read(name, number * size, (number + 1) * size).view(shape)


def numbers(codes: Tensor, scale_inv: Tensor, dtype: torch.dtype) -> Tensor:
    """Code times scale in float32, rounded to `dtype`: of codes and scales in the shapes of `put`,
    or of one expert's.
    """
    rows, columns = codes.shape[-2:]
    parts = scale_inv.shape[-3] if scale_inv.ndim > codes.ndim else 1
    matrices = codes.reshape(-1, rows // parts, columns)
    blocks = scale_inv.reshape(len(matrices), *scale_inv.shape[-2:])
    kernels = choice.kernels(torch.empty(0, dtype=dtype, device=codes.device))
    if kernels is c:
        return c.dequantise(matrices, blocks, dtype).view(codes.shape)
    if kernels is not None:
        from dsv3_mtp.precision import triton_quantise

        return triton_quantise.dequantise(matrices, blocks, dtype).view(codes.shape)
    e4m3 = matrices.view(torch.float8_e4m3fn)
    if matrices.shape[1] % EDGE == 0:  # no block is in two of them
        return dequantise(e4m3.flatten(0, 1), blocks.flatten(0, 1), BLOCK, dtype).view(codes.shape)
    each = [dequantise(*pair, BLOCK, dtype) for pair in zip(e4m3, blocks, strict=True)]
    return torch.stack(each).view(codes.shape)
