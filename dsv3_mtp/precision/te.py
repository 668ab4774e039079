"""Transformer Engine: te.Linear and te.GroupedLinear under the Float8BlockScaling recipe.

Parameters stay ours: the TE modules are handed the layer's own `weight`, and are themselves not
part of the model, so that checkpoints and optimizers see the same names and tensors with every
backend.
"""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsv3_mtp.ops.experts import Stack, whole
from dsv3_mtp.ops.te_library import load
from dsv3_mtp.precision.quantise import Scale

ALIGN = 16  # tokens of a product, and dimensions of a weight


def unsupported(device: torch.device) -> str | None:
    """Why this backend cannot run here, None if it can."""
    if device.type != "cuda":
        return "needs a Hopper GPU; there is no CUDA device"
    return load()[1] or None


@functools.cache
def recipe(scale: Scale) -> Any:
    """V3's products in TE's words: E4M3, x and dy 1 x 128, W 128 x 128, float32 accumulation."""
    from transformer_engine.common.recipe import Float8BlockScaling, QParams

    made = Float8BlockScaling()
    parameters = QParams(power_2_scale=scale == "pow2", amax_epsilon=0.0)
    # No dataclass fields, for want of annotations: as arguments of the constructor they would be
    # dropped silently.
    made.fp8_quant_fwd_inp = made.fp8_quant_fwd_weight = made.fp8_quant_bwd_grad = parameters
    return made


class TELinear(nn.Linear):
    """A bias-free nn.Linear, computed by te.Linear."""

    def __init__(self, inputs: int, outputs: int, scale: Scale):
        super().__init__(inputs, outputs, bias=False)
        self.scale: Scale = scale
        self.inner: tuple[Any, ...] = ()

    def forward(self, x: Tensor) -> Tensor:
        if not self.inner:  # not before: ZeRO-3 would shard it as one of the model's own
            sides, dtype = (self.in_features, self.out_features), self.weight.dtype
            inner = load()[0].Linear(*sides, bias=False, params_dtype=dtype, device="meta")
            self.inner = (inner,)  # no submodule, or the weight would be registered twice
        rows = x.flatten(0, -2)
        padded = F.pad(rows, (0, 0, 0, -rows.shape[0] % ALIGN))
        # at each call: loading may have put another one here
        self.inner[0]._parameters["weight"] = self.weight
        with load()[0].autocast(enabled=True, recipe=recipe(self.scale)):
            y = self.inner[0](padded)
        self.inner[0]._parameters["weight"] = None  # one that was made for this product goes now
        return y[: rows.shape[0]].unflatten(0, x.shape[:-1])


class TEGroupedLinear:
    """grouped_linear(x, weight, counts) by te.GroupedLinear; the stacked `weight` lends its
    slices.
    """

    def __init__(self, scale: Scale):
        self.scale: Scale = scale
        self.inner: Any = None

    def __call__(self, x: Tensor, weight: Tensor | Stack, counts: list[int]) -> Tensor:
        """x: (rows, in) sorted by group, weight: (E, out, in), E counts -> (rows, out)."""
        te, weight = load()[0], whole(weight)
        groups, out, width = weight.shape
        if not len(x):  # single groups may be empty, but TE cannot quantise no rows at all
            return x @ weight[0].T  # (0, out), and zeros for the gradient of every group
        if self.inner is None:
            self.inner = te.GroupedLinear(
                groups, width, out, bias=False, params_dtype=weight.dtype, device="meta"
            )
            self.pad, self.unpad = te.Fp8Padding(groups, ALIGN), te.Fp8Unpadding(groups, ALIGN)
            # torch refuses to set a registered name to what is no Parameter
            for group in range(groups):
                del self.inner._parameters[f"weight{group}"]
        for group, matrix in enumerate(weight.unbind()):
            setattr(self.inner, f"weight{group}", matrix)
        padded, padded_splits = self.pad(x, counts)
        with te.autocast(enabled=True, recipe=recipe(self.scale)):
            y = self.inner(padded, padded_splits)
        for group in range(groups):  # as in TELinear
            setattr(self.inner, f"weight{group}", None)
        return self.unpad(y, counts)


def quantise(x: Tensor, tile: tuple[int, int], scale: Scale) -> tuple[Tensor, Tensor]:
    """What TE's own quantiser makes of x (M, K): codes (M, K) uint8 and scale_inv in rows and
    columns of tiles.
    """
    import transformer_engine_torch as tex
    from transformer_engine.pytorch.tensor.float8_blockwise_tensor import Float8BlockQuantizer

    quantiser = Float8BlockQuantizer(
        tex.DType.kFloat8E4M3,
        rowwise=True,
        columnwise=False,
        force_pow_2_scales=scale == "pow2",
        block_scaling_dim=1 if tile[0] == 1 else 2,
    )
    quantised = quantiser(x)
    scale_inv = quantised._rowwise_scale_inv  # of 1 x 128 tiles it is transposed; padded to four
    return quantised._rowwise_data, scale_inv.t() if tile[0] == 1 else scale_inv
