"""Linear layers whose three products run in FP8 (V3 section 3.3, Fig. 6): y = x W^T, dx = dy W, dW
= dy^T x.

Each operand is quantised from high precision along the dimension that its product contracts: x and
dy by 1 x 128 tiles (in dW along the tokens), W by 128 x 128 blocks. Parameters stay what they are
in high precision: `weight`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dsv3_mtp.ops.experts import Stack, from_experts, sort_by_expert, to_experts
from dsv3_mtp.ops.swiglu import gated_swiglu
from dsv3_mtp.precision.quantise import BLOCK, ROW, Tile


class Blocks(NamedTuple):
    """Matrices that are in FP8 already, in 128 x 128 blocks."""

    codes: Tensor  # (N, K) or (E, N, K) float8_e4m3fn
    scale_inv: Tensor  # (N/128, K/128) or (E, N/128, K/128) float32


class Product:
    """product(a, tile of a, b, tile of b) = a b^T in FP8. Of groups one by one: a tile never holds
    rows of two.
    """

    multiple = 1  # what the rows of every group have to be a multiple of

    def __call__(self, a: Tensor, a_tile: Tile, b: Tensor | Blocks, b_tile: Tile) -> Tensor:
        """a: (M, K), b: (N, K), both quantised along K -> (M, N) in the type of `a`."""
        raise NotImplementedError

    def grouped(self, x: Tensor, tile: Tile, weight: Tensor | Blocks, rows: list[int]) -> Tensor:
        """Rows of group e times weight[e]^T, the weight in blocks. x: (M, K), weight: (E, N, K) ->
        (M, N).
        """
        if isinstance(weight, Blocks):
            each = zip(x.split(rows), *weight, strict=True)
            return torch.cat([self(part, tile, Blocks(*own), BLOCK) for part, *own in each])
        parts = zip(x.split(rows), weight, strict=True)
        return torch.cat([self(part, tile, matrix, BLOCK) for part, matrix in parts])

    def grouped_over_rows(self, a: Tensor, b: Tensor, rows: list[int]) -> Tensor:
        """Of each group a^T b over its rows, in tiles along them. a: (M, N), b: (M, K) -> (E, N,
        K).
        """
        parts = zip(a.split(rows), b.split(rows), strict=True)
        return torch.stack([self(left.t(), ROW, right.t(), ROW) for left, right in parts])


@dataclass(frozen=True)
class Recipe:
    """What the three products of a layer are."""

    product: Product
    # of dy in dx = dy W; BLOCK is the setting with which V3 saw a run diverge (appendix B.2)
    gradient: Tile = ROW

    def linear(self, x: Tensor, weight: Tensor | Blocks) -> Tensor:
        """x: (..., in), weight: (out, in) -> (..., out). Blocks have no backward."""
        if isinstance(weight, Blocks):
            return self.product(x.flatten(0, -2), ROW, weight, BLOCK).unflatten(0, x.shape[:-1])
        return _Linear.apply(x.flatten(0, -2), weight, self).unflatten(0, x.shape[:-1])

    def grouped_linear(self, x: Tensor, weight: Tensor | Stack, counts: list[int]) -> Tensor:
        """Rows of group e times weight[e]^T. x: (rows, in), weight: (E, out, in), E counts ->
        (rows, out).

        Fastest with counts that are multiples of product.multiple: others are padded with rows of
        zeros. A stack has no backward.
        """
        multiple = self.product.multiple
        padded = [-(-n // multiple) * multiple for n in counts]
        if padded == counts:
            if isinstance(weight, Tensor):
                return _GroupedLinear.apply(x, weight, counts, self)
            blocks = weight.blocks()
            own = weight.whole() if blocks is None else Blocks(*blocks)
            return self.product.grouped(x, ROW, own, counts)
        before, gap = torch.tensor(counts), torch.tensor(padded) - torch.tensor(counts)  # (E,) each
        place = torch.arange(len(x)) + (gap.cumsum(0) - gap).repeat_interleave(before)  # (rows,)
        place = place.to(x.device)
        wide = x.new_zeros(sum(padded), x.shape[1]).index_copy(0, place, x)
        return self.grouped_linear(wide, weight, padded).index_select(0, place)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, recipe: Recipe):
        ctx.save_for_backward(x, weight)
        ctx.recipe = recipe
        return recipe.product(x, ROW, weight, BLOCK)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        product, tile = ctx.recipe.product, ctx.recipe.gradient
        grad_x = product(grad, tile, weight.t(), BLOCK) if ctx.needs_input_grad[0] else None
        grad_weight = product(grad.t(), ROW, x.t(), ROW) if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight, None


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, rows: list[int], recipe: Recipe):
        ctx.save_for_backward(x, weight)
        ctx.rows, ctx.recipe = rows, recipe
        return recipe.product.grouped(x, ROW, weight, rows)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        product, tile = ctx.recipe.product, ctx.recipe.gradient
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = product.grouped(grad, tile, weight.transpose(1, 2), ctx.rows)
        if ctx.needs_input_grad[1]:
            grad_weight = product.grouped_over_rows(grad, x, ctx.rows)
        return grad_x, grad_weight, None, None


class FP8Linear(nn.Linear):
    """A bias-free nn.Linear with FP8 products."""

    def __init__(self, inputs: int, outputs: int, recipe: Recipe):
        super().__init__(inputs, outputs, bias=False)
        self.recipe = recipe

    def forward(self, x: Tensor) -> Tensor:
        return self.recipe.linear(x, self.weight)


# Rows of group e times weight[e]^T: rows (rows, in) sorted by group, weight (E, out, in), E counts
# -> (rows, out).
GroupedLinear = Callable[[Tensor, Tensor | Stack, list[int]], Tensor]


@dataclass(frozen=True)
class RoutedExperts:
    """The routed experts of a layer (ops/experts.py: `routed`) by grouped products with a backward
    of their own.
    """

    gate_up: GroupedLinear
    down: GroupedLinear
    multiple: int = 1  # rows of an expert that these want, padded with zeros

    def __call__(
        self,
        x: Tensor,
        gates: Tensor,
        gate_up: Tensor | Stack,
        down: Tensor | Stack,
        chosen: Tensor,
        counts: Tensor,
    ) -> Tensor:
        """Sum over the K chosen experts of gate * expert(x): the arguments of `routed`."""
        multiple = self.multiple
        # the one time that the host waits
        rows = [-(-n // multiple) * multiple for n in counts.tolist()]
        layout = sort_by_expert(chosen, gates, counts, multiple, sum(rows))
        inner = self.gate_up(to_experts(x, layout), gate_up, rows)  # (rows, 2F)
        y = self.down(gated_swiglu(inner, layout.gates), down, rows)  # (rows, C)
        return from_experts(y, layout)
