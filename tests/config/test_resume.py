"""Whether a key may change on resume is said where the key is."""

import pytest

from dsv3_mtp.config.resume import FREE, differences, keys, rule_of
from dsv3_mtp.config.section import OnResume


@pytest.mark.parametrize("key", list(keys()))
def test_every_key_says_what_a_resumed_run_may_do_with_it(key):
    assert isinstance(rule_of(key), OnResume)


def test_a_key_speaks_before_its_section_and_a_section_for_what_lies_in_it():
    assert rule_of("train.dtype") is OnResume.FIXED
    assert rule_of("train.batch_size_ramp.start") is OnResume.RECORDED
    assert rule_of("model.rope_scaling.factor") is OnResume.FIXED
    assert rule_of("mtp.loss_weight.values") is OnResume.RECORDED
    assert rule_of("log.wandb.project") is OnResume.FREE
    assert rule_of("deepspeed.zero_optimization.stage") is OnResume.FREE


def test_what_shapes_the_weights_is_fixed_and_what_only_places_the_work_is_free():
    rules = {key: rule_of(key) for key in keys()}
    for key, rule in rules.items():
        if key.startswith("model."):
            assert rule is OnResume.FIXED, key
        if key.startswith(("parallel.", "log.", "checkpoint.", "eval.")):
            assert rule is OnResume.FREE, key
        if key.startswith(("optim.", "fp8.")):
            assert rule is OnResume.RECORDED, key
    fixed = {key for key, rule in rules.items() if rule is OnResume.FIXED}
    assert {"run.seed", "data.seq_len", "mtp.mode", "train.freeze"} <= fixed
    assert {"mtp.loss_weight", "train.total_tokens"}.isdisjoint(fixed | set(FREE))


def test_differences_are_dotted_keys_with_both_values():
    before, now = {"a": {"b": 1, "c": 2}, "d": [1]}, {"a": {"b": 1, "c": 3}, "d": [2], "e": None}
    assert differences(before, now) == {"a.c": (2, 3), "d": ([1], [2])}
    assert differences(before, now, ignoring=("a",)) == {"d": ([1], [2])}
