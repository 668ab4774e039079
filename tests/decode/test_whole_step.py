"""A step in one call of C against the same step in pieces."""

import copy

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

    def record(self, rows, last, filled, count, *how):
        calls.append(count)
        return original(self, rows, last, filled, count, *how)

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
    settings.append(Settings(20, draft_depth=3, draft_dtype="int8"))
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


DRAFTS = {"all": {}, "draft_vocab": {"draft_vocab": tuple(range(0, 64, 3))}}
DRAFTS["int8"] = {"draft_dtype": "int8"}


@pytest.mark.parametrize("how", DRAFTS.values(), ids=DRAFTS)
def test_samples_have_the_plain_distribution_and_drafts_stand_as_often_as_in_pieces(
    make_model, compiled, monkeypatch, how
):
    calls, model = steps_in_c(monkeypatch), make_model("one_module", trained=True)
    monkeypatch.setattr(c_decode, "ROWS", 10**4)  # else so many rows go piece by piece
    whole = check_distribution(model, how)
    assert set(calls) >= {2} and len(calls) >= 2
    del calls[:]
    monkeypatch.setattr(Decoder, "whole_step", lambda self, drafter: None)
    pieces = check_distribution(model, how)
    assert not calls
    # standard error 0.02 and less
    assert whole.joint == pytest.approx(pieces.joint, abs=0.06)


def test_samples_repeat_with_their_seed_only(make_model, compiled):
    model = make_model("one_module", trained=True)

    def text(seed):
        use = Settings(30, draft_depth=2, temperature=2.0, seed=seed)
        return generate(model, [[5], [7]], use).tokens

    assert text(1) == text(1) != text(2)


def whole_step(model, **how) -> tuple[Step, dict]:
    """A step with the first module, and the tensors of a row of 12 slots, whose caches are
    empty.
    """
    slots = CacheSlots(model, 12)
    decoder = Decoder(model, **how)
    kind = model.mtp.drafter(model.mtp_config)
    drafter = kind(decoder, slots, rows=1, depth=1, chunk=4)
    tensors = {"ids": torch.zeros(1, 16, dtype=torch.long), "caches": slots.caches(3, 1)}
    tensors |= {"angles": slots.rotation, "ring": drafter.rings[0].states}
    return decoder.whole_step(drafter), tensors | {"module_caches": drafter.caches}


@torch.inference_mode()
def test_what_would_be_read_beyond_is_refused(make_model, compiled):
    step, tensors = whole_step(make_model())
    caches, ids = tensors["caches"], tensors["ids"]
    for wrong, message in (
        ({"ring": tensors["ring"][:, :, :31]}, "ring"),
        ({"ring": None}, "ring"),
        ({"ids": ids.int()}, "ids"),
        ({"ids": ids.repeat(2, 1)}, "cache"),
        ({"caches": caches[:2]}, "caches"),
        ({"caches": [cache[:, :9] for cache in caches]}, "cache"),
        ({"module_caches": [cache.double() for cache in tensors["module_caches"]]}, "cache"),
    ):
        with pytest.raises(ValueError, match=message):
            Rows(step, **tensors | wrong)
    rows, filled, coins = Rows(step, **tensors), [1], torch.rand(1, 3, dtype=torch.float64)
    accepted, tokens = step(rows, [2], filled, 1, 0.0, None)
    assert len(tokens[0]) == accepted[0] + 1 and filled == [2]
    assert ids[0, 3 : 4 + accepted[0]].tolist() == tokens[0]
    for last, slots, count, message in (
        ([11], [10], 1, "last"),  # the draft would be in slot 12
        ([-1], [1], 1, "last"),
        ([2, 2], [1, 1], 1, "size"),
        ([2], [1], -1, "count"),
        ([2], [-1], 1, "filled"),
        ([2], [2], 1, "filled"),  # a draft needs a slot of the module's
        ([2], [1, 1], 1, "size"),
    ):
        with pytest.raises(ValueError, match=message):
            step(rows, last, slots, count, 0.0, None)
    for temperature, wrong in (
        (0.0, coins),
        (1.0, None),
        (1.0, coins[:, :2]),
        (1.0, coins.float()),
    ):
        with pytest.raises(ValueError, match="coins"):
            step(rows, [2], [1], 1, temperature, wrong)
    ids[0, 2] = 64
    with pytest.raises(IndexError, match="1 tokens"):
        step(rows, [2], [1], 1, 0.0, None)


@pytest.mark.parametrize("how", [{}, {"draft_int8": True}], ids=["as it is", "int8"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("where", ["lm_head", "the trunk's last layer", "the module"])
@torch.inference_mode()
def test_logits_that_are_not_finite_are_named(make_model, compiled, where, temperature, how):
    """Of the trunk, with a draft and without one, and of the module's drafts."""
    model = copy.deepcopy(make_model())
    layers = {"the trunk's last layer": model.model.layers[-1], "the module": model.mtp.layers[0]}
    weight = model.lm_head.weight if where == "lm_head" else next(layers[where].parameters())
    weight[3] = float("nan")
    step, tensors = whole_step(model, **how)
    for count in (1,) if where == "the module" else (0, 1):
        coins = torch.rand(1, 2 * count + 1, dtype=torch.float64) if temperature else None
        with pytest.raises(ValueError, match="not finite"):
            step(Rows(step, **tensors), [2], [1], count, temperature, coins)


def test_no_token_is_the_largest_of_numbers_that_are_not_finite(compiled):
    for dtype in (torch.float32, torch.bfloat16):
        for width in (3, 16, 37):
            x = torch.randn(2, width).to(dtype)
            assert c_decode.largest(x).tolist() == x.argmax(-1).tolist()
            x[1, :2] = -torch.inf
            assert c_decode.largest(x).tolist() == x.argmax(-1).tolist()
            for wrong in (torch.nan, torch.inf):
                x[1, -1] = wrong
                with pytest.raises(ValueError, match="not finite"):
                    c_decode.largest(x)
