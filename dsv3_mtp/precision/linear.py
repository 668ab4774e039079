"""Linear layers whose three products run in FP8 (V3 section 3.3, Fig. 6): y = x W^T, dx = dy W, dW = dy^T x.

Each operand is quantised from high precision along the dimension that its product contracts: x and dy by 1 x 128 tiles
(in dW along the tokens), W by 128 x 128 blocks. Parameters stay what they are in high precision: `weight`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dsv3_mtp.precision.quantise import BLOCK, ROW, Tile

# product(a (M, K), tile of a, b (N, K), tile of b) -> (M, N), both quantised along K
Product = Callable[[Tensor, Tile, Tensor, Tile], Tensor]


@dataclass(frozen=True)
class Recipe:
    """What the three products of a layer are."""

    product: Product
    gradient: Tile = ROW  # of dy in dx = dy W; BLOCK is the setting with which V3 saw a run diverge (appendix B.2)

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        """x: (..., in), weight: (out, in) -> (..., out)."""
        return _Linear.apply(x.flatten(0, -2), weight, self).unflatten(0, x.shape[:-1])

    def grouped_linear(self, x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
        """Rows of group e times weight[e]^T. x: (rows, in), weight: (E, out, in), counts: (E,) -> (rows, out)."""
        return _GroupedLinear.apply(x, weight, counts.tolist(), self)


def _input_gradient(recipe: Recipe, grad: Tensor, weight: Tensor) -> Tensor:
    return recipe.product(grad, recipe.gradient, weight.t(), BLOCK)


def _weight_gradient(recipe: Recipe, grad: Tensor, x: Tensor) -> Tensor:
    return recipe.product(grad.t(), ROW, x.t(), ROW)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, recipe: Recipe):
        ctx.save_for_backward(x, weight)
        ctx.recipe = recipe
        return recipe.product(x, ROW, weight, BLOCK)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        grad_x = _input_gradient(ctx.recipe, grad, weight) if ctx.needs_input_grad[0] else None
        grad_weight = _weight_gradient(ctx.recipe, grad, x) if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight, None


class _GroupedLinear(torch.autograd.Function):
    """Group by group: a tile never holds the tokens of two experts."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, counts: list[int], recipe: Recipe):
        ctx.save_for_backward(x, weight)
        ctx.counts, ctx.recipe = counts, recipe
        parts = zip(x.split(counts), weight, strict=True)
        return torch.cat([recipe.product(part, ROW, matrix, BLOCK) for part, matrix in parts])

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        grads = grad.split(ctx.counts)
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            parts = zip(grads, weight, strict=True)
            grad_x = torch.cat([_input_gradient(ctx.recipe, part, matrix) for part, matrix in parts])
        if ctx.needs_input_grad[1]:
            inputs = zip(grads, x.split(ctx.counts), strict=True)
            grad_weight = torch.stack([_weight_gradient(ctx.recipe, part, rows) for part, rows in inputs])
        return grad_x, grad_weight, None, None


class FP8Linear(nn.Module):
    """A bias-free nn.Linear with the same `weight` and FP8 products."""

    def __init__(self, linear: nn.Linear, recipe: Recipe):
        super().__init__()
        self.weight = linear.weight  # (out, in)
        self.recipe = recipe

    def forward(self, x: Tensor) -> Tensor:
        return self.recipe.linear(x, self.weight)
