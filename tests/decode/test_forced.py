"""Overlap of drafts along real text by the drafter: of every kind of head, and beyond D."""

import pytest
import torch

from dsv3_mtp.decode.decoder import Decoder
from dsv3_mtp.decode.draft import draft_limit
from dsv3_mtp.decode.forced import ForcedSampler, forced_overlap
from dsv3_mtp.decode.generation import Settings
from dsv3_mtp.decode.sample import DraftSampler, TokenSampler
from tests.conftest import tiny
from tests.decode.plain import CYCLE, HEADS, plain_logits

TEXT = [*CYCLE, *CYCLE[:9]]


def is_recycled(keys: dict) -> bool:
    mtp = tiny(keys).mtp
    return mtp.kind.drafter(mtp).limit(mtp, 4) == 4


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_of_trained_depths_it_is_that_of_the_teacher_forced_forward(make_model, heads, temperature):
    model, mtp = make_model(heads, trained=True), tiny(HEADS[heads]).mtp
    depth = draft_limit(model, mtp.drafts)
    logits = plain_logits(model, TEXT)
    for first in (1, 4, 11):
        settings = Settings(draft_depth=depth, temperature=temperature)
        found = forced_overlap(Decoder(model), torch.tensor([TEXT, TEXT]), first, settings)
        for draft in range(1, 1 + depth):
            head, back = mtp.kind.drafter(mtp).origin(mtp, draft)
            if first - 1 - back < 0:
                continue
            q = (logits[head, first - 1 - back] / temperature).softmax(-1)
            p = (logits[0, first - 1 + draft] / temperature).softmax(-1)
            expected = torch.minimum(p, q).sum().expand(2)
            torch.testing.assert_close(found[:, draft - 1], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("recycle", ["last", "cycle"])
@pytest.mark.parametrize("heads", [name for name in HEADS if is_recycled(HEADS[name])])
def test_beyond_d_it_is_of_what_a_free_drafter_draws_from(make_model, monkeypatch, heads, recycle):
    """Forced to say what a free one drew, the drafter has the free one's distributions."""
    model = make_model(heads, trained=True)
    settings = Settings(draft_depth=4, temperature=1.0, recycle=recycle)
    text, free, kept = torch.tensor([TEXT[:8]]), [], []

    class Free(ForcedSampler):
        def draw(self, logits, confidence=None):
            tokens, probability = DraftSampler.draw(self, logits, confidence)
            self.seen.append(probability)
            free.append((tokens, probability))
            return tokens, probability

    rows = torch.cat([text, text.new_zeros(1, 4)], 1)
    with monkeypatch.context() as patched:
        patched.setattr("dsv3_mtp.decode.forced.ForcedSampler", Free)
        forced_overlap(Decoder(model), rows, 7, settings)
    drawn = torch.stack([tokens for tokens, _ in free], 1)
    rows = torch.cat([text, drawn], 1)
    plain = TokenSampler.probabilities

    def keep(self, logits):
        kept.append(plain(self, logits))
        return kept[-1]

    monkeypatch.setattr(TokenSampler, "probabilities", keep)
    found = forced_overlap(Decoder(model), rows, 7, settings)
    q = torch.stack([probability for _, probability in free], 1)
    p = kept[-1].view(1, 4, -1)
    torch.testing.assert_close(found, torch.minimum(p, q).sum(-1))
    main = plain_logits(model, rows[0].tolist())[0, 7:11].softmax(-1)
    torch.testing.assert_close(p[0], main, rtol=1e-4, atol=1e-5)


def test_drafts_among_a_few_tokens_overlap_less(make_model):
    model, rows = make_model("one_module", trained=True), torch.tensor([TEXT])
    whole = Settings(draft_depth=3, temperature=1.0)
    few = Settings(draft_depth=3, temperature=1.0, draft_vocab=tuple(range(0, 64, 2)))
    assert (
        forced_overlap(Decoder(model, draft_vocab=few.draft_vocab), rows, 5, few)
        < forced_overlap(Decoder(model), rows, 5, whole)
    ).any()


@pytest.mark.parametrize(("first", "temperature"), [(0, 1.0), (23, 1.0), (5, 0.0)])
def test_what_cannot_be_measured_is_refused(make_model, first, temperature):
    settings = Settings(draft_depth=3, temperature=temperature)
    with pytest.raises(ValueError, match="must be"):
        forced_overlap(Decoder(make_model("one_module")), torch.tensor([TEXT]), first, settings)
