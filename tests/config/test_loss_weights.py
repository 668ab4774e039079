"""Schedules of lambda and weights of depths as registered classes, and from elsewhere."""

import math
from itertools import pairwise
from pathlib import Path

import pytest
from pydantic import TypeAdapter, ValidationError

from dsv3_mtp.config import ConfigError, LossWeight, MTPConfig, load_config, schedules
from dsv3_mtp.config.depth_weights import DEPTH_WEIGHTS
from dsv3_mtp.config.loss_weights import LOSS_WEIGHTS, LambdaSchedule

TINY = Path(__file__).parents[2] / "configs" / "v3_tiny.yaml"
RATIO = {"type": "examples.loss_ratio:LossRatio", "share": 0.3, "first": 0.2}
# One of each kind; a new kind is asked for one here by test_every_kind_has_an_example.
EXAMPLES = {
    "constant": {"value": 0.3},
    "step": {"values": [0.3, 0.1], "at": [0.6757]},
    "linear": {"start": 0.3, "end": 0.1, "begin": 0.2, "until": 0.8},
    "cosine": {"start": 0.3, "end": 0.0, "begin": 0.2},
    "exponential": {"start": 0.3, "end": 0.01, "begin": 0.1, "until": 0.9},
    "warmup": {"value": 0.3, "until": 0.2},
    "piecewise": {"points": [[0, 0.1], [0.5, 0.3], [1, 0]]},
}


def schedule(value) -> LambdaSchedule:
    return TypeAdapter(LossWeight).validate_python(value)


def test_every_kind_has_an_example():
    assert set(EXAMPLES) == set(LOSS_WEIGHTS)


@pytest.mark.parametrize("kind", LOSS_WEIGHTS)
def test_a_schedule_is_read_from_yaml_written_back_and_gives_numbers(tmp_path, kind):
    config = load_config(TINY, [f"mtp.loss_weight={EXAMPLES[kind] | {'type': kind}}"])
    (tmp_path / "again.yaml").write_text(config.to_yaml())
    again = load_config(tmp_path / "again.yaml")
    assert again == config
    assert type(again.mtp.loss_weight) is LOSS_WEIGHTS[kind]
    assert again.to_dict()["mtp"]["loss_weight"]["type"] == kind
    values = [schedules.mtp_loss_weight(again.mtp.loss_weight, n / 100) for n in range(101)]
    assert all(0 <= value <= 0.3 + 1e-12 for value in values)
    assert hash(config.mtp) == hash(again.mtp)


def test_exponential_decay_is_the_same_factor_in_equal_parts():
    decay = schedule({"type": "exponential", "start": 0.4, "end": 0.1})
    values = [decay.weight(n / 8) for n in range(9)]
    assert (values[0], values[-1]) == (0.4, 0.1)
    factors = [b / a for a, b in pairwise(values)]
    assert factors == pytest.approx([0.25 ** (1 / 8)] * 8, rel=1e-12)
    inner = schedule({"type": "exponential", "start": 1, "end": 2, "begin": 0.25, "until": 0.75})
    assert [inner.weight(p) for p in (0, 0.25, 0.5, 0.75, 1)] == pytest.approx(
        [1, 1, math.sqrt(2), 2, 2], rel=1e-12
    )


@pytest.mark.parametrize("rule", DEPTH_WEIGHTS)
@pytest.mark.parametrize("depths", [1, 2, 3, 7])
def test_a_rule_of_depths_leaves_lambda_its_meaning(rule, depths):
    mtp = MTPConfig(num_nextn_predict_layers=depths, depth_weights={"type": rule}, loss_weight=0.3)
    weights = schedules.depth_loss_weights(mtp, 0.0)  # at the start; one may fall
    assert len(weights) == depths
    assert sum(weights) == pytest.approx(0.3, rel=1e-12)


def test_exponential_depths_are_fastmtps():
    """arXiv 2509.18362: beta = 0.6 gives 0.51, 0.31, 0.18 of the loss to three depths."""
    mtp = MTPConfig(
        num_nextn_predict_layers=3,
        depth_weights={"type": "exponential", "beta": 0.6},
        loss_weight=1,
    )
    assert schedules.depth_loss_weights(mtp, 0.0) == pytest.approx((0.51, 0.31, 0.18), abs=0.005)
    equal = mtp.model_copy(update={"depth_weights": DEPTH_WEIGHTS["exponential"](beta=1)})
    assert schedules.depth_loss_weights(equal, 0.0) == (1 / 3,) * 3
    shrunk = MTPConfig.model_validate(mtp.model_dump() | {"curriculum": "reverse"})
    assert schedules.depth_loss_weights(shrunk, 1.0)[1:] == (0.0, 0.0)


@pytest.mark.parametrize(
    ("sets", "lines"),
    [
        (
            ["mtp.loss_weight={type: exponential, start: 0.3, end: 0}"],
            ["mtp.loss_weight.end: must be > 0 (got 0)"],
        ),
        (
            ["mtp.loss_weight={type: step, value: x, values: [-1], at: [2]}"],
            [
                "mtp.loss_weight.values[0]: must be >= 0 (got -1)",
                "mtp.loss_weight.at[0]: must be < 1 (got 2)",
                "mtp.loss_weight.value: unknown key of type step (values, at); value is a key of "
                "constant, warmup",
            ],
        ),
        (
            [
                "mtp.loss_weight={type: step, values: [0.3, 0.1], at: [0.5]}",
                "mtp.loss_weight.end=0",
            ],
            [
                "mtp.loss_weight.end: unknown key of type step (values, at); end is a key of "
                "cosine, exponential, linear: "
                "write mtp.loss_weight={{type: cosine, start: 0.3, end: 0}}"
            ],
        ),
        (
            ["mtp.loss_weight={type: step, values: [0.3], at: [], until: 0.2}"],
            [
                "mtp.loss_weight.until: unknown key of type step (values, at); until is a key of "
                "cosine, exponential, linear, warmup: write mtp.loss_weight={{type: warmup, "
                "value: 0.3, until: 0.2}}"
            ],
        ),
        (
            ["mtp.depth_weights={type: exponential, beta: 2}"],
            ["mtp.depth_weights.beta: must be <= 1 (got 2)"],
        ),
        (
            ["mtp.depth_weights={type: exponentail}"],
            [
                "mtp.depth_weights: type must be one of annealed, exponential (got 'exponentail'); "
                "did you mean 'exponential'?"
            ],
        ),
        (["mtp.depth_weights=3"], ["mtp.depth_weights: must be a list (got 3)"]),
        (
            ['mtp.loss_weight={type: "examples.nothing:Here"}'],
            ["mtp.loss_weight: examples.nothing cannot be imported from"],
        ),
        (
            ['mtp.loss_weight={type: "examples.loss_ratio:Nothing"}'],
            ["mtp.loss_weight: {root}/examples/loss_ratio.py has no Nothing"],
        ),
        (
            ['mtp.loss_weight={type: "collections:OrderedDict"}'],
            [
                "mtp.loss_weight: collections:OrderedDict is no subclass of "
                "dsv3_mtp.config.loss_weights.base.LambdaSchedule"
            ],
        ),
        (
            ['mtp.loss_weight={type: "examples.loss_ratio:LossRatio", share: 0, smooth: 1}'],
            [
                "mtp.loss_weight.share: must be > 0 (got 0)",
                "mtp.loss_weight.first: missing; it has no default",
                "mtp.loss_weight.smooth: unknown key; did you mean 'mtp.loss_weight.smoothing'?",
            ],
        ),
    ],
    ids=lambda value: value[0][:48],
)
def test_a_faulty_schedule_has_one_line_per_mistake(monkeypatch, sets, lines):
    root = Path(__file__).parents[2]
    monkeypatch.chdir(root)
    with pytest.raises(ConfigError) as error:
        load_config(TINY, sets)
    found = [f"{key}: {text}" for key, text in error.value.problems]
    assert len(found) == len(lines)
    for got, wanted in zip(found, lines, strict=True):
        assert got.startswith(wanted.format(root=root)), got


def test_a_schedule_from_elsewhere_is_read_written_and_used(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "square_schedule.py").write_text(
        "from dsv3_mtp.config import LambdaSchedule\n"
        "class Square(LambdaSchedule):\n"
        "    top: float = 1.0\n"
        "    def weight(self, progress):\n"
        "        return self.top * progress**2\n"
    )
    config = load_config(TINY, ['mtp.loss_weight={type: "square_schedule:Square", top: 0.5}'])
    assert schedules.depth_loss_weights(config.mtp, 0.5) == (0.125,)
    (tmp_path / "again.yaml").write_text(config.to_yaml())
    assert load_config(tmp_path / "again.yaml") == config


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
def test_a_schedule_that_gives_no_weight_is_an_error(value):
    class Bad(LambdaSchedule):
        type: str = "bad"

        def weight(self, progress):
            return value

    with pytest.raises(ValueError, match=r"mtp.loss_weight: bad must give a number >= 0 \(got"):
        schedules.mtp_loss_weight(Bad(), 0.5)


def test_a_state_begins_and_goes_on_as_json_holds_it():
    mtp = MTPConfig(loss_weight=RATIO)
    state = schedules.first_state(mtp)
    assert schedules.mtp_loss_weight(mtp.loss_weight, 0.0, state) == 0.2
    for main, head in ((4.0, 8.0), (2.0, 8.0)):
        metrics = {"train/main_loss": main, "train/mtp_loss/1": head, "train/loss": 99.0}
        state = schedules.next_state(mtp, state, metrics)
    assert state == pytest.approx({"main": 3.8, "heads": 8.0})
    assert schedules.depth_loss_weights(mtp, 0.5, state) == pytest.approx((0.3 * 3.8 / 8,))
    assert schedules.first_state(MTPConfig()) is None
    assert schedules.next_state(MTPConfig(), None, {}) is None


def test_a_state_that_no_checkpoint_could_hold_is_an_error():
    mtp = MTPConfig(loss_weight=RATIO)
    metrics = {"train/main_loss": math.nan, "train/mtp_loss/1": 1.0}
    with pytest.raises(
        ValueError, match=r"the state of examples\.loss_ratio:LossRatio cannot be sa"
    ):
        schedules.next_state(mtp, schedules.first_state(mtp), metrics)


def test_a_class_without_its_function_says_so():
    class Empty(LambdaSchedule):
        type: str = "empty"

    with pytest.raises(TypeError, match="abstract method weight"):
        Empty().weight(0.5)


def test_two_classes_of_one_name_are_an_error():
    with pytest.raises(ValueError, match="there are two of loss-weight schedule 'step'"):
        LOSS_WEIGHTS.register(LOSS_WEIGHTS["step"])


def test_a_section_needs_its_type():
    with pytest.raises(ValidationError):
        schedule({"value": 1})
