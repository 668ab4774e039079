"""A wrong head, objective, schedule or source of a file of one's own ends in one sentence that
names it: what it says of itself when the config is read, what it gives when it is called.
"""

import sys
from typing import Any

import numpy as np
import pytest
import torch

from dsv3_mtp.cli import command
from dsv3_mtp.config import AdaptiveSchedule, LambdaSchedule, SourceSection, code, schedules
from dsv3_mtp.data.own import OwnSource
from dsv3_mtp.data.sampler import Sampler
from dsv3_mtp.heads.base import Head
from dsv3_mtp.heads.parallel import Parallel
from dsv3_mtp.model.causal_lm import DeepseekV3MTP
from dsv3_mtp.model.states import HeadOutput
from dsv3_mtp.objectives.base import Objective
from dsv3_mtp.tasks.base import Draws, Example, ExampleTask, LossOn
from tests.conftest import tiny

HERE = sys.modules[__name__]


def own(kind: str, base: type, **members: Any) -> str:
    """`tests.heads.test_own:KIND`, a class of these members that is there from now on."""
    members |= {"__module__": __name__}
    setattr(HERE, kind, type(kind, (base,), members))
    return f"{__name__}:{kind}"


def says(value: Any) -> classmethod:
    return classmethod(lambda cls, mtp, *depth: value)


def forward(change: Any) -> Any:
    return lambda self, inputs: change(Parallel.forward(self, inputs))


def rows(**what: Any) -> Any:
    return forward(lambda out: HeadOutput([r._replace(**what) for r in out.rows], out.stats))


TERM = {"terms": says({"mine": 1.0}), "count_terms": classmethod(lambda *_: torch.ones(1))}
HEADS: dict[str, tuple[dict[str, Any], str]] = {
    "ReadsNothing": ({"reads": says(None)}, r"reads\(mtp\) must be a set of last_input"),
    "ReadsAWord": ({"reads": says("last_input")}, "got 'last_input'"),
    "ReadsWrong": ({"reads": says({"last_imput"})}, "got {'last_imput'}"),
    "Backward": ({"offset": says(0)}, r"0 <= horizon\(mtp, 1\) < offset\(mtp, 1\) <= 4097"),
    "Text": ({"offset": says("2")}, "got 0 and '2'"),
    "Far": ({"offset": says(10**9)}, "got 0 and 1000000000"),
    "Leaks": ({"horizon": says(2)}, "got 2 and 2"),
    "GivesNothing": ({"forward": forward(lambda out: None)}, "HeadOutput of HeadRows .got None"),
    "GivesTwice": (
        {"forward": forward(lambda out: HeadOutput(out.rows * 2, out.stats))},
        r"rows of depths 1\.\.2, each once \(got \[1, 2, 1, 2\]\)",
    ),
    "OtherDepth": ({"forward": rows(depths=(9,))}, r"each once \(got \[9, 9\]\)"),
    "MainDepth": ({"forward": rows(depths=(0,))}, r"each once \(got \[0, 0\]\)"),
    "ShortRows": ({"forward": rows(inputs=(torch.zeros(2, 3, 32),))}, r"reads \(2, 3, 32\), not"),
    "NoStats": (
        {"forward": forward(lambda out: HeadOutput(out.rows))},
        "stats of 0 routers, and there are 2",
    ),
    "CountsNothing": ({"terms": says({"mine": 1.0})}, r"shape \(1,\), .* \(got \(0,\)\)"),
    "NoTerms": (TERM, r"the sums of mine, and nothing else \(got \[\]\)"),
    "WideTerm": ({**TERM, "loss_terms": lambda *_: {"mine": torch.ones(2)}}, r"got \(2,\)"),
    "FloatTerm": ({**TERM, "loss_terms": lambda *_: {"mine": 1.0}}, "got float"),
}


@pytest.mark.parametrize("kind", HEADS)
def test_a_wrong_head(kind: str):
    members, said = HEADS[kind]
    mode = own(kind, Parallel, **members)
    with pytest.raises(ValueError, match=said) as error:
        config = tiny({"mtp.mode": mode, "mtp.num_nextn_predict_layers": 2})
        model = DeepseekV3MTP(config.model, config.mtp)
        model.init_weights(0)
        model(torch.randint(64, (2, 16 + model.lookahead)))
    assert mode in str(error.value)


def gives(value: Any) -> Any:
    return lambda self, slots: value(slots)


OBJECTIVES: dict[str, tuple[dict[str, Any], str]] = {
    "NoName": ({"loss": gives(lambda s: s.kl)}, "must have a name of letters"),
    "Spaced": ({"name": "a b", "loss": gives(lambda s: s.kl)}, "must have a name of letters"),
    "Taken": ({"name": "mtp_loss", "loss": gives(lambda s: s.kl)}, "mtp_loss, .* logged already"),
    "NoLoss": ({"name": "x"}, "NoLoss has no loss"),
    "Wants": ({"name": "x", "__init__": lambda self, x: None, "loss": None}, "has no arguments"),
    "Scalar": ({"name": "x", "loss": gives(lambda s: s.kl.mean())}, r"shape \[\], not \[2, 32\]"),
    "Wide": (
        {"name": "x", "loss": gives(lambda s: s.log_q)},
        r"shape \[2, 32, 64\], not \[2, 32\]",
    ),
    "Half": ({"name": "x", "loss": gives(lambda s: s.kl.half())}, "float16, not float32 or wider"),
    "Whole": ({"name": "x", "loss": gives(lambda s: s.logits.argmax(-1))}, "int64, not float32"),
    "Number": ({"name": "x", "loss": gives(lambda s: 1.0)}, "loss of x gives a float, no tensor"),
    "Constant": (
        {"name": "x", "loss": gives(lambda s: s.kl.detach())},
        "loss of x has no gradient",
    ),
    "Writes": (
        {"name": "x", "loss": gives(lambda s: s.log_p.exp_().sum(-1) + s.log_q.sum(-1))},
        "writes into slots.log_p",
    ),
    "Counts": (
        {"name": "x", "loss": gives(lambda s: s.kl), "counted": lambda self, valid: valid.sum()},
        r"`counted` of x must give a bool tensor of shape \[2, 2, 16\] \(got torch.int64 \[\]\)",
    ),
}


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_a_wrong_objective(kind: str):
    members, said = OBJECTIVES[kind]
    name = own(f"{kind}Objective", Objective, **members)
    with pytest.raises(ValueError, match=said.replace(kind, f"{kind}Objective")):
        config = tiny({"mtp.objective": {name: 1.0}, "mtp.num_nextn_predict_layers": 2})
        model = DeepseekV3MTP(config.model, config.mtp)
        model.init_weights(0)
        model(torch.randint(64, (2, 16 + model.lookahead)))


def test_an_objective_counts_no_slot_without_a_target():
    every = {"loss": gives(lambda s: s.kl), "counted": lambda self, valid: valid | True}
    name = own("All", Objective, name="all", **every)
    config = tiny({"mtp.objective": {name: 1.0, "kl": 1.0}, "mtp.num_nextn_predict_layers": 2})
    model = DeepseekV3MTP(config.model, config.mtp)
    counts = model.loss.counts(torch.randint(64, (2, 16 + model.lookahead)))[4:]
    assert counts.tolist() == [30, 28, 30, 28]


def test_methods_that_a_class_owes_are_named():
    for base, lacking in (
        (Head, "cost, forward, reads"),
        (LambdaSchedule, "weight"),
        (AdaptiveSchedule, "first_state, next_state, weight_in"),
        (SourceSection, "open"),
        (ExampleTask, "example, example_length, vocab_size"),
    ):
        with pytest.raises(ValueError, match=f"has no {lacking}; docs/extend.md"):
            code.subclass(own(f"Bare{base.__name__}", base), base)


class Tripled(AdaptiveSchedule):
    def first_state(self) -> Any:
        return {"w": 0.1}

    def next_state(self, state: Any, metrics: Any) -> Any:
        return None

    def weight_in(self, state: Any, progress: float) -> Any:
        return "0.3"


def test_a_schedule_gives_numbers_and_its_state_is_a_mapping():
    mtp = tiny({"mtp.loss_weight": {"type": f"{__name__}:Tripled"}}).mtp
    with pytest.raises(ValueError, match=r"Tripled must give a number >= 0 \(got '0.3' at"):
        schedules.mtp_loss_weight(mtp.loss_weight, 0.5)
    with pytest.raises(ValueError, match=r"state of .*Tripled must be a mapping \(got null\)"):
        schedules.next_state(mtp, schedules.first_state(mtp), {})


class Made(ExampleTask):
    loss_on: LossOn = "answer"
    made: Any = None

    @property
    def vocab_size(self) -> int:
        return 6

    @property
    def example_length(self) -> int:
        return 4

    def example(self, draws: Draws) -> Any:
        return self.made


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (None, "makes a NoneType, no Example"),
        (Example([0.5] * 4, [(2, 4)]), "not whole numbers"),  # type: ignore[list-item]
        (Example([0] * 5, [(2, 4)]), "5 tokens, where example_length is 4"),
        (Example([0, 6], [(1, 2)]), r"ids 0\.\.6, where vocab_size is 6"),
        (Example([-1, 0], [(1, 2)]), r"ids -1\.\.0"),
        (Example([0, 1], [(1, 3)]), r"answers \[\(1, 3\)\] in 2 tokens"),
        (Example([0, 1], [(0, 1)]), "the first a prompt"),
    ],
)
def test_a_wrong_example(made: Any, said: str):
    task = Made.model_construct(type="mine", made=made)
    with pytest.raises(ValueError, match=said):
        task.stream(7, None).sample(0, 10)


def zeros(length: int) -> np.ndarray:
    return np.zeros(length, np.int64)


class Rows:
    path = manifest_hash = "mine"
    tokens = documents = bytes = tokenizer_sha256 = longest_document = task = text = None
    vocab_size = 64

    def __init__(self, row: Any):
        self.row = row

    def id_range(self) -> Any:
        return 0

    def stream(self, seq_len: int, key: Any) -> Any:
        return self

    def sample(self, index: int, length: int) -> Any:
        return self.row(length)


class Opened(SourceSection):
    row: Any = None

    def open(self, split: str) -> Any:
        return Rows(self.row)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (lambda n: None, "has null, not .tokens, documents."),
        (lambda n: (zeros(n),), "not .tokens, documents."),
        (lambda n: (zeros(n - 1), zeros(n)), r"tokens of shape \(9,\), not \(10,\)"),
        (lambda n: ([0] * n, zeros(n)), "tokens of shape list"),
        (lambda n: (zeros(n), zeros(n) / 2), "documents of float64"),
        (lambda n: (zeros(n), zeros(n), zeros(n)), "targets of int64"),
        (lambda n: (zeros(n) + 64, zeros(n)), r"ids 64\.\.64, where model.vocab_size = 64"),
        (lambda n: (np.random.randint(0, 9, n), zeros(n)), "another at the second look"),
    ],
)
def test_a_wrong_row(row: Any, said: str):
    source: Any = OwnSource(Opened.model_construct(type="mine", row=row), "train", 64)
    sampler = Sampler([source], seq_len=8, lookahead=2, seed=0)
    with pytest.raises(ValueError, match=f"mine: row 0 .*{said}"):
        sampler.next_batch(1)


def test_a_source_lacks_nothing():
    with pytest.raises(ValueError, match=r"id_range\(\) must give two ids \(got 0\)"):
        OwnSource(Opened.model_construct(type="mine"), "train", 64).id_range()
    section: Any = type("Nothing", (SourceSection,), {"open": lambda self, split: 3})
    with pytest.raises(ValueError, match=r"what open\('train'\) gives, a int, has no path, manif"):
        OwnSource(section.model_construct(type="mine"), "train", 64)


def test_an_error_in_one_s_own_file_is_told_with_its_place(tmp_path, monkeypatch, capsys):
    lines = ["from dsv3_mtp.heads.top import TOP", "class Odd(TOP):", "    name = None"]
    lines += ["    def cost(self):", "        return 1 / 0"]
    (tmp_path / "odd.py").write_text("\n".join(lines))
    (tmp_path / "c.yaml").write_text(tiny({}).to_yaml())
    monkeypatch.chdir(tmp_path)
    assert command.run("plan", ["--config", "c.yaml", "--set", "mtp.mode=odd:Odd"]) == 2
    said = capsys.readouterr().err
    assert said.endswith("odd.py:5, cost: ZeroDivisionError: division by zero\n"), said
    assert "Traceback" not in said
