"""A model made ready to decode: the trunk, the output head and the MTP heads, built of `layers`."""

from collections.abc import Callable
from functools import cache
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv3_mtp.decode.cache import Window
from dsv3_mtp.decode.layers import Layer, Norm
from dsv3_mtp.heads.heads import MTPModule, ParallelHead, TrunkStates
from dsv3_mtp.model.causal_lm import DeepseekV3MTP

DYNAMIC = r"L\['(window|caches?|tokens|hidden|x)'\].*"  # arguments whose sizes differ between calls


class Decoder:
    """The weights of one `generate`, under torch.inference_mode; made anew each time, so that they
    are never stale.
    """

    def __init__(self, model: DeepseekV3MTP, *, compile_up_to: int = 0):
        """compile_up_to: windows of at most so many slots run compiled (torch.compile)."""
        self.model, self.compile_up_to = model, compile_up_to
        if compile_up_to:
            weights = tuple(
                (weight.shape, weight.dtype, weight.device)
                for weight in model.state_dict().values()
            )
            self.kind = model.config.model_dump_json(), model.mtp_config.model_dump_json(), weights
        self.layers = Trunk(model)
        self.output = model.lm_head.weight.t()
        self.heads: list[Any] = []
        if model.mtp_config.mode == "sequential":
            self.heads = [Module(module, model) for module in model.mtp.layers]
        elif model.mtp_config.mode == "parallel":
            self.heads = [Head(head) for head in model.mtp.layers]

    def trunk(self, tokens: Tensor, caches: list[Tensor], window: Window) -> TrunkStates:
        """tokens: (B, T) of the window's slots; caches: (B, S, R+P) of each layer -> states, each
        (B*T, C).
        """
        return self._run(Trunk.forward, self.layers, tokens, caches, window=window)

    def logits(self, hidden: Tensor) -> Tensor:
        """Normed states (N, C) -> (N, V)."""
        return torch.mm(hidden, self.output)

    def module(
        self, depth: int, hidden: Tensor, tokens: Tensor, cache: Tensor, window: Window
    ) -> tuple[Tensor, Tensor]:
        """Sequential module of `depth`, the last one beyond: states (N, C) and tokens (N,) ->
        state, normed state.
        """
        head = self.heads[min(depth, len(self.heads)) - 1]
        return self._run(Module.forward, head, hidden, tokens, cache, window=window)

    def head(self, number: int, x: Tensor, cache: Tensor, window: Window) -> Tensor:
        """Parallel head: inputs of the trunk's last layer (N, C) -> normed states (N, C)."""
        return self._run(Head.forward, self.heads[number], x, cache, window=window)

    def _run(self, function: Callable, *arguments: Any, window: Window) -> Any:
        if window.shape[1] <= self.compile_up_to:
            function = compiled(function, self.output.device.type, self.kind)
        return function(*arguments, window)


@cache
def compiled(function: Any, device: str, kind: tuple) -> Callable:
    """One compiled function for all models of a kind: of the same configuration, with weights of
    the same layout.

    Torch compiles it for one token and for several, not as the cache grows. What it finds in `self`
    is the same for all models of the kind, and need not be checked on every call.
    """
    # Torch keeps graphs by code object, so that every kind needs its own.
    own = FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
    options: dict[str, Any] = {
        "guard_filter_fn": lambda guards: [not guard.name.startswith("self.") for guard in guards],
        "cpp_wrapper": device == "cpu",
    }
    run, seen = torch.compile(own, fullgraph=True, options=options), set()

    def call(*arguments: Any) -> Any:
        shape = arguments[-1].shape  # of the window
        if shape in seen:
            return run(*arguments)
        seen.add(shape)
        # Else torch learns it by compiling everything twice.
        with torch.compiler.config.patch(dynamic_sources=DYNAMIC):  # type: ignore[attr-defined]
            return run(*arguments)

    return call


class Trunk:
    """Embedding, decoder layers, final norm."""

    def __init__(self, model: DeepseekV3MTP):
        self.table = model.model.embed_tokens.weight
        self.layers = [Layer(layer) for layer in model.model.layers]  # type: ignore[arg-type]
        self.norm = Norm(model.model.norm)

    def forward(self, tokens: Tensor, caches: list[Tensor], window: Window) -> TrunkStates:
        x = last_input = F.embedding(tokens.flatten(), self.table)
        for layer, latents in zip(self.layers, caches, strict=True):
            last_input = x
            x = layer(x, latents, window)
        return TrunkStates(last_input, x, self.norm(x))


class Module:
    """A sequential module. `eh_proj` takes the weights of both norms in front of it."""

    def __init__(self, module: MTPModule, model: DeepseekV3MTP):
        norms = [Norm(norm) for norm in (module.enorm, module.hnorm) if norm is not None]
        gain = torch.cat([norm.gain for norm in norms])
        self.table, self.norms = model.model.embed_tokens.weight, norms
        self.layer, self.out_norm = Layer(module), Norm(module.shared_head.norm)
        self.merge = (module.eh_proj.weight * gain).to(module.eh_proj.weight.dtype).t()
        self.normed = model.mtp_config.trunk_hidden == "post_norm"

    def forward(
        self, hidden: Tensor, tokens: Tensor, cache: Tensor, window: Window
    ) -> tuple[Tensor, Tensor]:
        inputs = [hidden] if len(self.norms) == 1 else [F.embedding(tokens, self.table), hidden]
        merged = torch.cat(
            [norm.direction(x) for norm, x in zip(self.norms, inputs, strict=True)], dim=-1
        )
        out = self.layer(torch.mm(merged, self.merge), cache, window)
        normed = self.out_norm(out)
        return (normed if self.normed else out), normed


class Head:
    """A parallel head."""

    def __init__(self, head: ParallelHead):
        self.layer, self.norm = Layer(head), Norm(head.shared_head.norm)

    def forward(self, x: Tensor, cache: Tensor, window: Window) -> Tensor:
        return self.norm(self.layer(x, cache, window))
