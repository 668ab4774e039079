"""The `mtp` section: the heads, what they are trained on, and their weights in the loss.

"V3" is arXiv 2412.19437; numbers in brackets are DeepSeek-V3's own. Import these names from
dsv3_mtp.config.
"""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, ValidationError, field_validator

from dsv3_mtp.config.code import is_code
from dsv3_mtp.config.depth_weights import DepthWeights
from dsv3_mtp.config.kinds import head_kind, head_problems, heads, objective_kind
from dsv3_mtp.config.loss_weights import LossWeight
from dsv3_mtp.config.loss_weights.step import StepWeight
from dsv3_mtp.config.model import V3_TOKENS
from dsv3_mtp.config.reader import UNKNOWN, KeyProblems, Problem, problems_of, show
from dsv3_mtp.config.section import Integer, OnResume, Positive, Section

V3_WEIGHT = StepWeight(values=(0.3, 0.1), at=(10e12 / V3_TOKENS,))


class MTPConfig(Section):
    """The heads, and L = L_main + lambda(progress) / D * sum_k w_k L_k (V3 eq. 24-25)."""

    on_resume = OnResume.FIXED

    model_config = ConfigDict(extra="allow")  # the keys of the head's own options, checked below

    mode: str = "sequential"
    """none: the baseline; sequential: V3 2.2; parallel: arXiv 2404.19737; the others: docs/mtp.md;
    package.module:Class: a kind of head of your own (docs/extend.md).
    """
    num_nextn_predict_layers: Annotated[Integer, Field(ge=0, le=64)] = 1
    """Depths D, additional tokens predicted (1). Mode none accepts it and predicts none."""
    loss_weight: Annotated[LossWeight, OnResume.RECORDED] = V3_WEIGHT
    """lambda over progress (V3 4.2: 0.3, after 10T tokens 0.1). A bare number is constant."""
    depth_weights: Annotated[DepthWeights | None, OnResume.RECORDED] = None
    """w_k, k = 1..D: numbers, or {type: exponential, beta: 0.6} (FastMTP); null: 1 (V3 eq. 25)."""
    curriculum: Annotated[Literal["none", "forward", "reverse"], OnResume.RECORDED] = "none"
    """Active depths by stages: forward grows 1..D, reverse shrinks D..1 (arXiv 2505.22757)."""
    detach: Annotated[Literal["none", "trunk", "all"], OnResume.RECORDED] = "none"
    """Gradients stopped: none (V3), into the trunk, or also into embedding and output head."""

    objective: Annotated[dict[str, Positive], OnResume.RECORDED] = {"ce": 1.0}
    """What each depth is trained on, name: weight, added up: ce (label), kl, tv, lk, lk_hybrid
    (docs/mtp.md), or package.module:Class (docs/extend.md).
    """

    def __hash__(self) -> int:  # a dict has none, and sizes are cached by section
        return hash((self.mode, self.num_nextn_predict_layers))

    @property
    def depths(self) -> int:
        """D, or 0 for the baseline."""
        return 0 if self.mode == "none" else self.num_nextn_predict_layers

    @property
    def kind(self) -> Any:
        """The class of the heads (heads/base.py); None for the baseline. Imports torch."""
        return head_kind(self.mode)

    @property
    def options(self) -> Any:
        """The keys that only this kind of head has, as its `Options`; None for the baseline."""
        return None if self.mode == "none" else self.kind.Options(**(self.model_extra or {}))

    @property
    def objectives(self) -> list[tuple[Any, float]]:
        """The objectives (objectives/base.py) with their weights; none for the baseline."""
        named = self.objective.items() if self.depths else ()
        return [(objective_kind(name)(), weight) for name, weight in named]

    @property
    def term_names(self) -> list[str]:
        """Under which names the terms of the loss other than the label's cross-entropy are logged:
        mtp_term/NAME of those that the heads own, NAME/k of the objectives.
        """
        own = [f"mtp_term/{name}" for name in self.kind.terms(self)] if self.depths else []
        kinds = [kind for kind, _ in self.objectives if not kind.cross_entropy]
        return own + [f"{kind.name}/{k}" for kind in kinds for k in range(1, 1 + self.depths)]

    @property
    def offsets(self) -> tuple[int, ...]:
        """(1+D): slot i of depth k is scored against t_{i+offset}; 1 for the main head."""
        return 1, *(self.kind.offset(self, depth) for depth in range(1, 1 + self.depths))

    @property
    def lookahead(self) -> int:
        """Tokens of a sample after its T inputs: 1+D where depth k predicts t_{i+k+1}."""
        return max(self.offsets)

    @property
    def drafts(self) -> int:
        """Tokens that the heads draft in one step: as far as they predict beyond the next one."""
        return self.lookahead - 1

    @property
    def reads_tokens(self) -> bool:
        """Some depth reads the embedding of a token after t_i."""
        return any(self.kind.horizon(self, depth) > 0 for depth in range(1, 1 + self.depths))

    @classmethod
    def more_keys(cls) -> list[str]:
        """The keys of all registered kinds of heads, for suggestions."""
        return [key for kind in heads().values() for key in kind.Options.model_fields]

    @field_validator("mode")
    @classmethod
    def _known_mode(cls, mode: str) -> str:
        try:
            head_kind(mode)
        except ValueError as error:
            raise KeyProblems([("", str(error))]) from None
        return mode

    @field_validator("objective")
    @classmethod
    def _known_objectives(cls, objective: dict[str, float]) -> dict[str, float]:
        problems: list[Problem] = []
        found: dict[str, str] = {}
        for name in objective:
            try:
                kind = objective_kind(name)
            except ValueError as error:
                problems.append((name, str(error)))
                continue
            if (other := found.setdefault(kind.name, name)) != name:
                text = f"is logged under the name of {other}, {kind.name}; give the class another"
                problems.append((name, text))
        if not objective:
            problems.append(("", "must name at least one objective, as in {ce: 1.0} (got {})"))
        if problems:
            raise KeyProblems(problems)
        return objective

    def rules(self) -> Iterator[Problem]:
        extra = self.model_extra or {}
        yield from option_problems(self.mode, extra)
        kept = {} if self.mode == "none" else self.kind.Options.model_fields
        own = {key: value for key, value in extra.items() if key in kept}
        parsed = None
        with suppress(ValidationError):  # reported above
            parsed = dict(self.kind.Options(**own)) if kept else {}
            object.__setattr__(self, "__pydantic_extra__", parsed)
        if self.mode != "none" and self.num_nextn_predict_layers < 1:
            text = f"must be >= 1 with mode {self.mode} (got {self.num_nextn_predict_layers})"
            yield "num_nextn_predict_layers", f"{text}; mtp.mode=none turns the heads off"
        elif self.mode != "none" and parsed is not None:
            yield from self.kind.problems(self)
            yield from head_problems(self) if is_code(self.mode) else ()
        count = len(self.depth_weights) if isinstance(self.depth_weights, tuple) else self.depths
        if self.mode != "none" and count != self.depths:
            text = f"must hold num_nextn_predict_layers = {self.depths} numbers (got {count})"
            yield "depth_weights", text
        for key, default in unused_keys(self.mode).items():
            if key in type(self).model_fields and getattr(self, key) != default:
                yield key, without_effect(self.mode, getattr(self, key), default)


def unused_keys(mode: str) -> dict[str, Any]:
    """Keys of `mtp:` that heads of this mode do not have, with their defaults."""
    kind = head_kind(mode)
    own = {} if kind is None else kind.Options.model_fields
    fields = [item for other in heads().values() for item in other.Options.model_fields.items()]
    # D and lambda may stay, so that mtp.mode=none turns a file into its own baseline
    common = () if kind else ("depth_weights", "curriculum", "detach", "objective")
    fields += [(key, MTPConfig.model_fields[key]) for key in common]
    return {key: field.default for key, field in fields if key not in own}


def without_effect(mode: str, value: Any, default: Any) -> str:
    """What is said of a key that this kind of head does not have."""
    remedy = f"remove it or set {show(default)}"
    return f"has no effect with mode {mode}; {remedy} (got {show(value)})"


def option_problems(mode: str, extra: Mapping[str, Any]) -> Iterator[Problem]:
    """What is wrong with the keys of `mtp:` that not every kind of head has. A key of another
    registered kind may stand at that one's default.
    """
    kind = head_kind(mode)
    own: dict[str, Any] = {}
    foreign = unused_keys(mode)
    for key, value in extra.items():
        if kind is not None and key in kind.Options.model_fields:
            own[key] = value
        elif key not in foreign:
            yield key, UNKNOWN
        elif value != foreign[key]:
            yield key, without_effect(mode, value, foreign[key])
    if kind is not None:
        try:
            kind.Options(**own)
        except ValidationError as error:
            yield from problems_of(error, own, kind.Options)
