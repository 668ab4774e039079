"""What makes a study uninterpretable stands in the first line of its report."""

import pytest

from dsv3_mtp.study.alarms import alarms, dirty
from dsv3_mtp.study.archive import table_of
from dsv3_mtp.study.expand import expand
from tests.study.toy import START, five_seeds, load_toy, record_of

DRAFTS = "acceptance/T0/tokens_per_step"


def alarms_of(tmp_path, metrics, *, primary="val/main_loss", **more):
    """metrics: arm -> metrics of each of its runs."""

    def choose(tree):
        five_seeds(tree)
        tree["primary"] |= {"metric": primary, "comparison": "schedule"}

    loaded = load_toy(tmp_path, choose)
    records = [
        record_of(loaded, run, {"val/main_loss": 4.0, **metrics.get(run.arm, {})}, **more)
        for run in expand(loaded, {})
    ]
    table = table_of(loaded.study.arms, loaded.study.seeds, records)
    return alarms(loaded.study, table), table


@pytest.mark.parametrize(
    ("value", "words"),
    [(1.99, "every arm is at the ceiling, 1.99 of 2"), (1.01, "every arm is at the floor, 1.01")],
)
def test_both_arms_at_the_same_end_of_the_metric(tmp_path, value, words):
    both = {arm: {DRAFTS: value, "acceptance/T0/distinct": 0.9} for arm in ("constant", "step")}
    found, _ = alarms_of(tmp_path, both, primary=DRAFTS)
    assert len(found) == 1 and words in found[0]
    both["step"][DRAFTS] = 1.5
    assert alarms_of(tmp_path, both, primary=DRAFTS)[0] == []


def test_a_text_that_repeats_itself_is_no_evidence_for_drafts(tmp_path):
    both = {arm: {DRAFTS: 1.5, "acceptance/T0/distinct": 0.9} for arm in ("constant", "step")}
    both["step"]["acceptance/T0/distinct"] = 0.36
    found, _ = alarms_of(tmp_path, both, primary=DRAFTS)
    assert len(found) == 1 and "repeats itself" in found[0] and "step 0.36" in found[0]
    assert alarms_of(tmp_path, both)[0] == []  # the main loss does not ask for it


def test_a_main_model_above_the_trigram_floor(tmp_path):
    arms = {arm: {"val/floor/trigram": 3.4} for arm in ("constant", "step")}
    arms["step"]["val/main_loss"] = 3.3
    found, _ = alarms_of(tmp_path, arms)
    assert len(found) == 1 and "constant 4.000 against 3.400 nats" in found[0]
    assert "step" not in found[0] and "early-training numbers" in found[0]
    arms["constant"]["val/main_loss"] = 3.39
    assert alarms_of(tmp_path, arms)[0] == []


FLOORS = {"val/floor/trigram": 3.4, "val/floor/bigram": 3.8, "val/floor/unigram": 5.3}


@pytest.mark.parametrize(
    ("loss", "worse"),
    [(3.5, ""), (3.9, ", worse than a bigram table"), (5.4, ", worse than a unigram table")],
)
def test_the_smallest_table_that_is_better_is_named(tmp_path, loss, worse):
    arms = {"constant": FLOORS | {"val/main_loss": loss}, "step": FLOORS | {"val/main_loss": 3.3}}
    [alarm], _ = alarms_of(tmp_path, arms)
    assert "not below the trigram floor" in alarm
    assert f"constant {loss:.3f} against 3.400{worse} nats" in alarm


@pytest.mark.parametrize(
    ("constant", "step", "words"),
    [
        (
            3.5,
            3.6,
            "both arms (3.500 to 3.600 nats) are worse than a trigram table of TOKENS (3.400)",
        ),
        (
            4.1,
            4.1,
            "both arms (4.100 nats) are worse than a bigram table of TOKENS "
            "(a trigram table has 3.400)",
        ),
        (
            5.5,
            3.6,
            "constant (5.500 nats) are worse than a unigram table, of step (3.600 nats) than a "
            "trigram table of TOKENS (a trigram table has 3.400)",
        ),
    ],
)
def test_several_arms_above_the_floor_are_one_sentence(tmp_path, constant, step, words):
    losses = {"constant": constant, "step": step}
    arms = {arm: FLOORS | {"val/main_loss": loss} for arm, loss in losses.items()}
    words = words.replace("TOKENS", "their own training tokens")
    early = "drafting numbers are early-training numbers"
    assert alarms_of(tmp_path, arms)[0] == [f"the main models of {words}; {early}"]


def test_a_tree_with_uncommitted_changes_is_told(tmp_path):
    _, table = alarms_of(tmp_path, {}, starts=[START.model_copy(update={"dirty": True})])
    assert "(constant-seed1, constant-seed2, constant-seed3 and 12 more)" in (dirty(table) or "")
    assert dirty(alarms_of(tmp_path, {})[1]) is None
