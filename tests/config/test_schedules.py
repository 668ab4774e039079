"""Schedules at their boundaries, where progress is a rounded quotient of token counts."""

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from dsv3_mtp.config import (
    BatchSizeRamp,
    LossWeight,
    MTPConfig,
    OptimConfig,
    load_config,
    schedules,
)

V3 = load_config(Path(__file__).parents[2] / "configs" / "v3_671b.yaml")
T = 10**12  # one trillion tokens
TOTAL = 14_800_000_000_000


def weight(value, progress):
    return schedules.mtp_loss_weight(TypeAdapter(LossWeight).validate_python(value), progress)


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [(0, 0.3), (0.6756 * TOTAL, 0.3), (10 * T - 1, 0.3), (10 * T, 0.1), (TOTAL, 0.1)],
)
def test_v3_loss_weight_switches_exactly_at_10t(tokens, expected):
    assert schedules.mtp_loss_weight(V3.mtp.loss_weight, tokens / TOTAL) == expected
    assert schedules.mtp_loss_weight(MTPConfig().loss_weight, tokens / TOTAL) == expected


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (0, 0.0),
        (0.0019 * TOTAL, 2.2e-4),
        (10 * T, 2.2e-4),
        (12_150_000_000_000, (2.2e-4 + 2.2e-5) / 2),
        (14_300_000_000_000, 2.2e-5),
        (14_632_999_999_999, 2.2e-5),
        (14_633_000_000_000, 7.3e-6),
        (TOTAL, 7.3e-6),
    ],
)
def test_v3_learning_rate(tokens, expected):
    assert schedules.learning_rate(V3.optim, tokens / TOTAL) == pytest.approx(expected, rel=1e-12)


def test_warmup_is_linear_and_may_be_absent():
    assert schedules.learning_rate(V3.optim, 0.0019 / 4) == pytest.approx(2.2e-4 / 4)
    optim = OptimConfig.model_validate({"schedule": {"warmup": 0}})
    assert schedules.learning_rate(optim, 0.0) == optim.lr


def test_an_empty_cosine_is_a_step():
    schedule = {
        "decay_start": 0.8,
        "decay_end": 0.8,
        "decay_ratio": 0.316,
        "final_start": 0.9,
        "final_ratio": 0.1,
    }
    optim = OptimConfig.model_validate({"lr": 1.0, "schedule": schedule})
    rates = [schedules.learning_rate(optim, p) for p in (0.7999, 0.8, 0.8999, 0.9)]
    assert rates == pytest.approx([1.0, 0.316, 0.316, 0.1])


@pytest.mark.parametrize(
    "edge", [V3.optim.schedule.warmup, V3.optim.schedule.decay_start, V3.optim.schedule.decay_end]
)
def test_learning_rate_is_continuous_up_to_the_last_stage(edge):
    before, after = (schedules.learning_rate(V3.optim, edge + side * 1e-9) for side in (-1, 1))
    assert before == pytest.approx(after, rel=1e-5)


@pytest.mark.parametrize(
    ("value", "table"),
    [
        (0.1, {0: 0.1, 0.5: 0.1, 1: 0.1}),
        (
            {"type": "step", "values": [3, 2, 1], "at": [0.25, 0.5]},
            {0: 3, 0.24: 3, 0.25: 2, 0.49: 2, 0.5: 1, 1: 1},
        ),
        ({"type": "linear", "start": 0.4, "end": 0.0}, {0: 0.4, 0.25: 0.3, 1: 0.0}),
        (
            {"type": "linear", "start": 1, "end": 3, "begin": 0.5, "until": 0.75},
            {0: 1, 0.5: 1, 0.625: 2, 0.75: 3, 1: 3},
        ),
        (
            {"type": "cosine", "start": 1, "end": 0},
            {0: 1, 1 / 3: 0.75, 0.5: 0.5, 2 / 3: 0.25, 1: 0},
        ),
        ({"type": "warmup", "value": 0.3, "until": 0.1}, {0: 0, 0.05: 0.15, 0.1: 0.3, 1: 0.3}),
        (
            {"type": "piecewise", "points": [[0.2, 1], [0.4, 3], [0.8, 0]]},
            {0: 1, 0.3: 2, 0.4: 3, 0.6: 1.5, 0.8: 0, 1: 0},
        ),
    ],
    ids=["constant", "step", "linear", "linear inside", "cosine", "warmup", "piecewise"],
)
def test_loss_weight_by_hand(value, table):
    assert {p: weight(value, p) for p in table} == pytest.approx(table, abs=1e-12)


@pytest.mark.parametrize(
    ("depths", "forward", "reverse"),
    [
        (1, [1] * 13, [1] * 13),
        (2, [1] * 6 + [2] * 7, [2] * 6 + [1] * 7),
        (3, [1] * 4 + [2] * 4 + [3] * 5, [3] * 4 + [2] * 4 + [1] * 5),
        (4, [1] * 3 + [2] * 3 + [3] * 3 + [4] * 4, [4] * 3 + [3] * 3 + [2] * 3 + [1] * 4),
    ],
)
def test_curricula_by_hand_over_twelfths(depths, forward, reverse):
    twelfths = [i / 12 for i in range(13)]
    assert [schedules.active_depths("forward", depths, p) for p in twelfths] == forward
    assert [schedules.active_depths("reverse", depths, p) for p in twelfths] == reverse
    assert {schedules.active_depths("none", depths, p) for p in twelfths} == {depths}


def test_stages_of_a_curriculum_begin_exactly_on_their_token():
    for depths in range(1, 60):
        stages = [
            schedules.active_depths("forward", depths, stage / depths) for stage in range(depths)
        ]
        assert stages == list(range(1, depths + 1))


def test_depth_loss_weights_are_lambda_over_d_times_w():
    mtp = MTPConfig(
        num_nextn_predict_layers=3,
        depth_weights=(3.0, 2.0, 1.0),
        curriculum="forward",
        loss_weight=0.3,
    )
    assert schedules.depth_loss_weights(mtp, 0.0) == pytest.approx((0.3, 0.0, 0.0))
    assert schedules.depth_loss_weights(mtp, 1 / 3) == pytest.approx((0.3, 0.2, 0.0))
    assert schedules.depth_loss_weights(mtp, 1.0) == pytest.approx((0.3, 0.2, 0.1))
    assert schedules.depth_loss_weights(MTPConfig(num_nextn_predict_layers=2), 10 * T / TOTAL) == (
        0.05,
        0.05,
    )
    assert schedules.depth_loss_weights(MTPConfig(mode="none"), 0.5) == ()


def test_router_bias_stops_exactly_at_14_3t():
    assert schedules.bias_update_speed(V3.train, (14_300_000_000_000 - 1) / TOTAL) == 0.001
    assert schedules.bias_update_speed(V3.train, 14_300_000_000_000 / TOTAL) == 0.0


def test_v3_batch_size_ramp():
    billion = 10**9
    table = {0: 3072, 234.5 * billion: 9216, 469 * billion: 15360, TOTAL: 15360}
    assert {t: schedules.batch_size(V3.train, t / TOTAL, 512) for t in table} == table
    assert schedules.batch_size(V3.train, 234.4 * billion / TOTAL, 512) == 8704


def test_batch_size_is_at_least_one_multiple_and_constant_without_a_ramp():
    assert schedules.batch_size(V3.train, 0.0, 4096) == 4096
    assert (
        schedules.batch_size(V3.train.model_copy(update={"batch_size_ramp": None}), 0.0, 512)
        == 15360
    )


@pytest.mark.parametrize("progress", [-0.01, 1.01, math.nan, math.inf])
def test_progress_outside_the_run_is_an_error(progress):
    calls = [
        lambda: schedules.learning_rate(V3.optim, progress),
        lambda: schedules.mtp_loss_weight(V3.mtp.loss_weight, progress),
        lambda: schedules.active_depths("forward", 2, progress),
        lambda: schedules.depth_loss_weights(V3.mtp, progress),
        lambda: schedules.bias_update_speed(V3.train, progress),
        lambda: schedules.batch_size(V3.train, progress, 1),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"within \[0, 1\]"):
            call()


number = st.floats(0, 10)
fraction = st.floats(0, 1)
weights = st.one_of(
    number,
    st.fixed_dictionaries(
        {"type": st.sampled_from(["linear", "cosine"]), "start": number, "end": number}
    ),
    st.fixed_dictionaries(
        {"type": st.just("warmup"), "value": number, "until": st.floats(1e-6, 1)}
    ),
    st.tuples(number, number, st.floats(1e-6, 1 - 1e-6)).map(
        lambda x: {"type": "step", "values": [x[0], x[1]], "at": [x[2]]}
    ),
    st.lists(fraction, min_size=2, max_size=5, unique=True).flatmap(
        lambda at: st.lists(number, min_size=len(at), max_size=len(at)).map(
            lambda values: {
                "type": "piecewise",
                "points": list(zip(sorted(at), values, strict=True)),
            }
        )
    ),
)


@given(weights, fraction)
def test_loss_weight_stays_within_its_own_values(value, progress):
    numbers = (
        [value]
        if isinstance(value, float)
        else [value[key] for key in ("start", "end", "value") if key in value]
    )
    if isinstance(value, dict):
        numbers += value.get("values", []) + [y for _, y in value.get("points", [])]
        numbers += [0.0] * (value["type"] == "warmup")
    assert min(numbers) - 1e-9 <= weight(value, progress) <= max(numbers) + 1e-9


@given(fraction)
def test_learning_rate_stays_within_zero_and_its_peak(progress):
    assert 0 <= schedules.learning_rate(V3.optim, progress) <= V3.optim.lr * (1 + 1e-12)


@given(st.integers(1, 64), fraction, st.integers(1, 64), st.integers(1, 64))
def test_batch_size_is_a_multiple_within_the_ramp(start, progress, more, multiple):
    ramp = BatchSizeRamp(start=start, until=0.3)
    train = V3.train.model_copy(update={"batch_size": start + more, "batch_size_ramp": ramp})
    size = schedules.batch_size(train, progress, multiple)
    assert size % multiple == 0 and multiple <= size <= max(start + more, multiple)
