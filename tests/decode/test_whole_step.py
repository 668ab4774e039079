"""A step in one call of C against the same step in pieces."""

import copy
from dataclasses import replace

import pytest
import torch

from dsv3_mtp.decode.cache import CacheSlots
from dsv3_mtp.decode.decoder import Decoder
from dsv3_mtp.decode.generate import Settings, generate
from dsv3_mtp.ops import c_decode
from dsv3_mtp.ops.c_step import Rows, Step
from tests.decode.plain import CYCLE
from tests.decode.test_generate import check_distribution

PROMPTS = [CYCLE[:9], [5], CYCLE[4:7], CYCLE[2:5]]


def steps_in_c(monkeypatch) -> list:
    """Grows by the number of drafts of each step that is one call."""
    calls, original = [], Step.__call__

    def record(self, rows, count, temperature, coins):
        calls.append(count)
        return original(self, rows, count, temperature, coins)

    monkeypatch.setattr(Step, "__call__", record)
    return calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("heads", ["one_module", "no_embedding", "pre_norm", "chain_trunk"])
def test_tokens_drafts_and_acceptance_are_those_of_the_pieces(
    make_model, compiled, monkeypatch, heads, dtype
):
    model = copy.deepcopy(make_model(heads, trained=True))
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    calls, found = steps_in_c(monkeypatch), []
    settings = [Settings(20, draft_depth=k) for k in (0, 1, 3)]
    settings.append(Settings(20, draft_depth=2, draft_vocab=tuple(range(0, 64, 2))))
    settings.append(Settings(20, draft_depth=1, stop_tokens=(41,)))
    for _ in range(2):
        for use in settings:
            for prompts in (PROMPTS[:1], PROMPTS):
                out = generate(model, prompts, use)
                found.append((out.tokens, out.acceptance))
        monkeypatch.setattr(Decoder, "whole_step", lambda self, drafter: None)
        calls.append(None)
    half = len(found) // 2
    assert found[:half] == found[half:]
    assert set(calls[: calls.index(None)]) >= {0, 1} and calls[-1] is None and len(calls) > 50
    assert any(0 < kept.joint[0] < 1 for _, kept in found[2:half])


@pytest.mark.parametrize("vocab", [(), tuple(range(0, 64, 3))], ids=["all", "draft_vocab"])
def test_samples_have_the_plain_distribution_and_drafts_stand_as_often_as_in_pieces(
    make_model, compiled, monkeypatch, vocab
):
    calls, model = steps_in_c(monkeypatch), make_model("one_module", trained=True)
    monkeypatch.setattr(c_decode, "ROWS", 10**4)  # else so many rows go piece by piece
    whole = check_distribution(model, {"draft_vocab": vocab})
    assert set(calls) >= {2} and len(calls) >= 2
    del calls[:]
    monkeypatch.setattr(Decoder, "whole_step", lambda self, drafter: None)
    pieces = check_distribution(model, {"draft_vocab": vocab})
    assert not calls
    # standard error 0.02 and less
    assert whole.joint == pytest.approx(pieces.joint, abs=0.06)


def test_samples_repeat_with_their_seed_only(make_model, compiled):
    model = make_model("one_module", trained=True)

    def text(seed):
        use = Settings(30, draft_depth=2, temperature=2.0, seed=seed)
        return generate(model, [[5], [7]], use).tokens

    assert text(1) == text(1) != text(2)


def whole_step(model, rows: int = 1) -> tuple[Step, Rows]:
    """A step with the first module, and rows of 3 known tokens of 12 slots, whose caches are
    empty.
    """
    slots = CacheSlots(model, 12)
    decoder = Decoder(model)
    kind = model.mtp.drafter(model.mtp_config)
    drafter = kind(decoder, slots, rows=rows, depth=1, chunk=4)
    ids = torch.zeros(rows, 16, dtype=torch.long)
    ring = drafter.rings[0].states
    state = Rows(ids, [2] * rows, slots.caches(3, rows), slots.rotation, ring, [1] * rows)
    state.module_caches = drafter.caches
    return decoder.whole_step(drafter), state


@torch.inference_mode()
def test_what_would_be_read_beyond_is_refused(make_model, compiled):
    model = make_model()
    step, rows = whole_step(model)
    accepted, tokens = step(rows, 1, 0.0, None)
    assert len(tokens[0]) == accepted[0] + 1 and rows.filled == [2]
    assert rows.ids[0, 3 : 4 + accepted[0]].tolist() == tokens[0]
    rows.filled = [1]
    coins = torch.rand(1, 3, dtype=torch.float64)
    for wrong, message in (
        ({"last": [11]}, "last"),  # the draft would be in slot 12
        ({"last": [-1]}, "last"),
        ({"filled": [-1]}, "filled"),
        ({"filled": [2]}, "filled"),  # a draft needs a slot of the module's
        ({"ring": rows.ring[:, :, :31]}, "ring"),
        ({"ids": rows.ids.int()}, "ids"),
        ({"caches": rows.caches[:2]}, "caches"),
        ({"caches": [cache[:, :9] for cache in rows.caches]}, "cache"),
        ({"module_caches": [cache.double() for cache in rows.module_caches]}, "cache"),
    ):
        with pytest.raises(ValueError, match=message):
            step(replace(rows, **wrong), 1, 0.0, None)
    for temperature, given in (
        (0.0, coins),
        (1.0, None),
        (1.0, coins[:, :2]),
        (1.0, coins.float()),
    ):
        with pytest.raises(ValueError, match="coins"):
            step(rows, 1, temperature, given)
    rows.ids[0, 2] = 64
    with pytest.raises(IndexError, match="1 tokens"):
        step(rows, 1, 0.0, None)


@torch.inference_mode()
def test_logits_that_are_not_finite_are_named(make_model, compiled):
    model = copy.deepcopy(make_model())
    model.lm_head.weight[3] = float("nan")
    step, rows = whole_step(model)
    with pytest.raises(ValueError, match="not finite"):
        step(rows, 1, 1.0, torch.rand(1, 3, dtype=torch.float64))
