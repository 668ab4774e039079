"""Sections of a run that say in which numbers products are computed, and by which attention
kernel.
"""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import BeforeValidator

from dsv3_mtp.config.reader import Problem, show
from dsv3_mtp.config.section import Boolean, OnResume, Section, not_number

FP8Module = Literal["attention", "dense_mlp", "shared_experts", "routed_experts", "eh_proj"]


class FP8Config(Section):
    """FP8 training (V3 3.3). Embedding, output head, router, norms and the attention core are never
    FP8.
    """

    on_resume = OnResume.RECORDED

    enabled: Annotated[Literal[True, False, "auto"], BeforeValidator(not_number)] = "auto"
    """auto: where the hardware multiplies FP8, or with the named backend; true: everywhere, by
    emulation if need be.
    """
    backend: Literal["auto", "te", "torch", "emulate"] = "auto"
    """te: Transformer Engine; torch: cuBLAS through torch; emulate: any device, slowly; auto: the
    first that runs.
    """
    scale: Literal["pow2", "fp32"] = "pow2"
    """Scales: powers of two (Transformer Engine) or any float32 (V3 3.3.2, except for cached
    activations).
    """
    modules: tuple[FP8Module, ...] = ("attention", "dense_mlp", "shared_experts", "routed_experts")
    """Linear layers in FP8. V3: all but eh_proj."""
    mtp: Boolean = True
    """MTP blocks like the trunk's."""
    accumulation: Literal["fp32", "fp22", "fp22_promote128"] = "fp32"
    """emulate only: the 14-bit accumulator of Hopper's tensor cores, with V3's promotion or without
    (V3 3.3.2).
    """
    gradient_tile: Literal["row", "block"] = "row"
    """Tiles of dy in dx = dy W. block: 128 x 128, with which V3 saw a run diverge (V3 B.2); emulate
    only.
    """

    def rules(self) -> Iterator[Problem]:
        only = "needs fp8.backend: emulate"
        if self.backend != "emulate":
            if self.accumulation != "fp32":
                yield (
                    "accumulation",
                    f"{only} (got {show(self.accumulation)} with backend {self.backend})",
                )
            if self.gradient_tile != "row":
                yield (
                    "gradient_tile",
                    f"{only} (got {show(self.gradient_tile)} with backend {self.backend})",
                )
        if self.enabled and not self.modules:
            yield (
                "modules",
                "must name at least one kind of layer, or set fp8.enabled: false (got [])",
            )


class AttentionConfig(Section):
    """The kernel of the attention core in training."""

    on_resume = OnResume.RECORDED

    backend: Literal["auto", "fa4", "fa3", "fa2", "te", "sdpa"] = "auto"
    """auto: the fastest that is installed and takes these shapes; a named one is used or
    refused.
    """
