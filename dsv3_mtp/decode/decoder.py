"""A model made ready to decode: the trunk and the output head, and the forms of its heads."""

from collections.abc import Callable, Sequence
from functools import cache
from types import FunctionType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dsv3_mtp.decode.cache import CacheSlots, FewSlots, Window
from dsv3_mtp.decode.layers import Layers
from dsv3_mtp.model.causal_lm import DeepseekV3MTP
from dsv3_mtp.model.states import TrunkStates
from dsv3_mtp.ops import c, c_decode, c_step, choice

if TYPE_CHECKING:
    from dsv3_mtp.decode.draft import Drafter

DYNAMIC = r"L\['(window|caches?|tokens|hidden|x)'\].*"  # arguments whose sizes differ between calls


class Decoder:
    """The weights of one `generate`, under torch.inference_mode; made anew each time, so that they
    are never stale.
    """

    def __init__(
        self,
        model: DeepseekV3MTP,
        *,
        compile_up_to: int = 0,
        draft_vocab: Sequence[int] = (),
        draft_int8: bool = False,
    ):
        """compile_up_to: windows of at most so many slots run compiled (torch.compile).

        draft_vocab: the tokens that drafts are among; (): all. draft_int8: where steps run in C,
        the drafts' output head and decoder layers are read in int8.
        """
        self.model, self.compile_up_to = model, compile_up_to
        if compile_up_to:
            weights = tuple(
                (weight.shape, weight.dtype, weight.device)
                for weight in model.state_dict().values()
            )
            self.kind = model.config.model_dump_json(), model.mtp_config.model_dump_json(), weights
        self.layers = DecodeTrunk(model)
        self.output: Tensor = model.lm_head.weight  # (V, C)
        self.by_c = choice.kernels(self.output) is c
        # with a draft vocabulary: its ids (N,), and their rows of the output head (N, C)
        self.draft_ids: Tensor | None = None
        if draft_vocab:
            self.draft_ids = torch.tensor(sorted(set(draft_vocab)), device=self.output.device)
        self.draft_output = self.output if self.draft_ids is None else self.output[self.draft_ids]
        if self.by_c:
            self.linear = c_decode.Linear(self.output)
            self.draft_linear = c_decode.Linear(self.draft_output, draft_int8)
        self.heads: list[Any] = model.mtp.decode_forms(model) if model.depths else []
        for form in self.heads if draft_int8 else ():
            if isinstance(layers := getattr(form, "layer", None), Layers):
                layers.read_int8()

    def whole_step(self, drafter: "Drafter | None") -> c_step.Step | None:
        """A step in one call of C, with what drafts or alone; None where it goes piece by piece."""
        if not self.by_c or self.compile_up_to:
            return None
        drafting = None if drafter is None else drafter.drafting()
        if drafter is not None and drafting is None:
            return None
        assert self.layers.layers.by_c is not None
        return c_step.Step(self.layers.layers.by_c, self.linear, drafting)

    def window(
        self,
        slots: CacheSlots,
        starts: Sequence[int],
        length: int,
        asked: Sequence[int] | None = None,
    ) -> Window | FewSlots:
        """The window of these slots, of the kind that its layers run fastest."""
        compiles = length <= self.compile_up_to
        if self.by_c and not compiles and len(starts) * length <= c_decode.ROWS:
            return slots.few(starts, length, asked)
        return slots.window(starts, length, asked)

    def trunk(self, tokens: Tensor, caches: list[Tensor], window: Window | FewSlots) -> TrunkStates:
        """tokens: (B, T) of the window's slots; caches: (B, S, R+P) of each layer -> states, each
        (B*T, C).
        """
        return self.run(DecodeTrunk.forward, self.layers, tokens, caches, window)

    def logits(self, hidden: Tensor) -> Tensor:
        """Normed states (N, C) -> (N, V)."""
        if self.by_c and hidden.shape[0] <= c_decode.ROWS:
            return self.linear(hidden.contiguous())
        return torch.mm(hidden, self.output.t())

    def draft_logits(self, hidden: Tensor) -> Tensor:
        """As `logits`; with a draft vocabulary of its tokens alone."""
        if self.by_c and hidden.shape[0] <= c_decode.ROWS:
            return self.draft_linear(hidden.contiguous())
        return torch.mm(hidden, self.draft_output.t())

    def narrow(self, logits: Tensor) -> Tensor:
        """Of logits (N, V) that a head made otherwise what `draft_logits` would have."""
        return logits if self.draft_ids is None else logits[:, self.draft_ids]

    def run(self, function: Callable, *arguments: Any) -> Any:
        """function(*arguments), compiled where a window is small enough. The last argument is the
        window; the first is one of `heads` or the trunk, whose weights do not change.
        """
        window = arguments[-1]
        if window.shape[1] <= self.compile_up_to:
            function = compiled(function, self.output.device.type, self.kind)
        return function(*arguments)


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


class DecodeTrunk:
    """Embedding, decoder layers, final norm."""

    def __init__(self, model: DeepseekV3MTP):
        table = model.model.embed_tokens.weight
        self.layers = Layers(model.model.layers, model.model.norm, table)  # type: ignore[arg-type]
        self.kept = model.model.kept  # numbers of the layers whose output heads read

    def forward(
        self, tokens: Tensor, caches: list[Tensor], window: Window | FewSlots
    ) -> TrunkStates:
        read, pre_norm, post_norm = self.layers(None, tokens, caches, window)
        layers = {k: pre_norm if k == len(read) - 1 else read[1 + k] for k in self.kept}
        return TrunkStates(read[-1], pre_norm, post_norm, layers)
