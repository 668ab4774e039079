"""Acceptance in one teacher-forced pass equals counting by brute force and equals what decoding
reports.
"""

import pytest

from dsv3_mtp.decode.generate import Acceptance, Settings, Step, generate
from dsv3_mtp.decode.offline import accepted_prefixes, offline_acceptance
from tests.decode.plain import CYCLE, HEADS, plain_greedy, plain_logits

PROMPT = CYCLE[:4]


def brute_force(model, text: list[int], m: int) -> int:
    """Drafts that stand when t_m is the last known token: drafted one by one, without a cache."""
    drafts = []
    for depth in range(1, 1 + model.depths):
        drafts.append(int(plain_logits(model, text[: m + 1] + drafts)[depth, m - 1].argmax()))
    right = [draft == token for draft, token in zip(drafts, text[m + 1 :], strict=False)]
    return (right + [False]).index(False)


def replay(prefixes: list[int], length: int, start: int, depths: int) -> Acceptance:
    """The steps that decoding takes through text of which every place's accepted drafts are
    known.
    """
    acceptance, m = Acceptance(), start
    while m < length - 1:
        count = min(depths, length - 2 - m)
        accepted = min(prefixes[m - start], count)
        acceptance.add(Step(0, [0] * (accepted + 1), accepted, count, False))
        m += accepted + 1
    return acceptance


@pytest.mark.parametrize("heads", HEADS)
def test_one_pass_equals_brute_force_and_the_counts_of_real_decoding(make_model, heads):
    model, seen = make_model(heads, trained=True), set()
    for prompt in (PROMPT, [5], [60, 1, 2], [33, 7, 50]):
        text = prompt + plain_greedy(model, prompt, 14)
        prefixes = accepted_prefixes(model, text, prompt_length=len(prompt)).sum(1).tolist()
        assert len(prefixes) == 13
        assert prefixes == [brute_force(model, text, m) for m in range(len(prompt), len(text) - 1)]
        real = generate(model, [prompt], Settings(max_new_tokens=14, draft_depth=model.depths))
        assert real.acceptance == replay(prefixes, len(text), len(prompt), model.depths)
        seen |= set(prefixes)
    assert {0, model.depths} <= seen  # acceptance and rejection were both met


def test_offline_acceptance_is_joint_over_all_places(make_model):
    model = make_model("sequential", trained=True)
    text = PROMPT + plain_greedy(model, PROMPT, 40)
    prefixes = accepted_prefixes(model, text, prompt_length=len(PROMPT)).sum(1)
    expected = [(prefixes >= 1).double().mean().item(), (prefixes[:-1] >= 2).double().mean().item()]
    assert offline_acceptance(model, text, prompt_length=len(PROMPT)) == expected
