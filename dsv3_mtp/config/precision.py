"""In which numbers products are computed, and by which attention kernel."""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import BeforeValidator

from dsv3_mtp.config.reader import Problem, show
from dsv3_mtp.config.section import Boolean, OnResume, Section, not_number

FP8Module = Literal["attention", "dense_mlp", "shared_experts", "routed_experts", "eh_proj"]


class FP8Config(Section):
    """FP8 training (V3 3.3), never of embedding, output head, router, norms and attention core."""

    on_resume = OnResume.RECORDED

    enabled: Annotated[Literal[True, False, "auto"], BeforeValidator(not_number)] = "auto"
    """auto: where the hardware has FP8, or with a named backend; true: everywhere, if emulated."""
    backend: Literal["auto", "te", "torch", "emulate"] = "auto"
    """te: Transformer Engine; torch: cuBLAS; emulate: any device, slowly; auto: first of these."""
    scale: Literal["pow2", "fp32"] = "pow2"
    """Powers of two (Transformer Engine), or float32 (V3 3.3.2, but for cached activations)."""
    modules: tuple[FP8Module, ...] = ("attention", "dense_mlp", "shared_experts", "routed_experts")
    """Linear layers in FP8. V3: all but eh_proj."""
    mtp: Boolean = True
    """MTP blocks like the trunk's."""
    accumulation: Literal["fp32", "fp22", "fp22_promote128"] = "fp32"
    """emulate only: Hopper's 14-bit accumulator, with V3's promotion or without (V3 3.3.2)."""
    gradient_tile: Literal["row", "block"] = "row"
    """emulate only: tiles of dy in dx = dy W; block: 128 x 128, with which V3 B.2 diverged."""

    def rules(self) -> Iterator[Problem]:
        for key, default in (("accumulation", "fp32"), ("gradient_tile", "row")):
            if self.backend != "emulate" and (value := getattr(self, key)) != default:
                got = f"(got {show(value)} with backend {self.backend})"
                yield key, f"needs fp8.backend: emulate {got}"
        if self.enabled and not self.modules:
            text = "must name at least one kind of layer, or set fp8.enabled: false (got [])"
            yield "modules", text


class AttentionConfig(Section):
    """The kernel of the attention core in training."""

    on_resume = OnResume.RECORDED

    backend: Literal["auto", "fa4", "fa3", "fa2", "te", "sdpa"] = "auto"
    """auto: the fastest installed that takes these shapes; a named one is used or refused."""
