"""Drafts are what the teacher-forced heads say, at every step of a decode and for every kind of
head.
"""

import pytest
import torch

from dsv3_mtp.decode.draft import Drafter, draft_limit
from dsv3_mtp.decode.generate import Settings, generate, stream
from dsv3_mtp.model.causal_lm import DeepseekV3MTP
from tests.conftest import tiny
from tests.decode.plain import CYCLE, HEADS, plain_logits


def draft_limit_of(keys: dict, depth: int) -> int:
    mtp = tiny(keys).mtp
    return mtp.kind.drafter(mtp).limit(mtp, depth)


class RecordingSampler:
    """Keeps the logits that drafts are drawn from; a threshold meets a random confidence."""

    generator = torch.Generator().manual_seed(0)

    def __init__(self, sampler):
        self.sampler, self.greedy, self.logits = sampler, sampler.greedy, []

    @property
    def ended(self):
        return self.sampler.ended

    def draw(self, logits, confidence=None):
        self.logits.append(logits.clone())
        return self.sampler.draw(logits, torch.rand(len(logits), generator=self.generator))


@pytest.fixture
def recorded(monkeypatch, in_pieces):
    """Every call of a drafter: (rows' known tokens, drafts, draft logits (K, B, V))."""
    calls = []
    settings = [tiny(keys).mtp for keys in HEADS.values()]
    for kind in {mtp.kind.drafter(mtp) for mtp in settings}:
        if "draft" not in vars(kind):  # it has its parent's
            continue

        def record(self, ids, last, count, sampler, original=kind.draft):
            recorder = RecordingSampler(sampler)
            known = [ids[row, : m + 1].tolist() for row, m in enumerate(last)]
            drafts, probability = original(self, ids, last, count, recorder)
            calls.append((known, drafts.tolist(), recorder.logits))
            return drafts, probability

        monkeypatch.setattr(kind, "draft", record)
    return calls


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize(
    ("prompts", "threshold"),
    [
        pytest.param([[5]], 0.0, marks=pytest.mark.slow),
        ([CYCLE[:9], [5], CYCLE[4:7]], 0.0),
        ([CYCLE[:9], [5], CYCLE[4:7]], 0.8),
    ],
    ids=["short", "batch", "threshold"],
)
def test_draft_logits_equal_the_training_forward_with_the_drafts_as_text(
    make_model, recorded, heads, prompts, threshold, monkeypatch
):
    """Caches after any number of rejections equal those of a fresh prefill, slots that are computed
    again and modules that were left out by a threshold included.
    """
    monkeypatch.setattr(Drafter, "LAG", 2)
    model = make_model(heads, trained=True)
    # as far as the heads predict
    depth = model.mtp_config.drafts
    generate(model, prompts, Settings(24, draft_depth=depth, draft_threshold=threshold))
    assert len(recorded) > 5
    lengths = {len(logits) for _, _, logits in recorded}  # of the depths that were computed
    assert not threshold or depth == 1 or len(lengths) > 1
    origin = model.mtp.drafter(model.mtp_config).origin
    for known, drafts, logits in recorded:
        for row, tokens in enumerate(known):
            expected = plain_logits(model, tokens + drafts[row])
            for number, drawn in enumerate(logits, start=1):
                depth, back = origin(model.mtp_config, number)
                # of slot m-1, m the last known token, or before it
                want = expected[depth, max(len(tokens) - 2 - back, 0)]
                want = torch.where(drawn[row] == float("-inf"), drawn[row], want)  # ruled out
                torch.testing.assert_close(drawn[row], want, rtol=1e-4, atol=1e-4)


def test_beyond_its_depths_a_chain_goes_on_drafting(make_model, recorded):
    """The recycled module sees new tokens and slots: it does not repeat its last draft."""
    model = make_model(trained=True)
    result = generate(model, [CYCLE[:6]], Settings(max_new_tokens=30, draft_depth=4))
    assert any(len(set(drafts[0])) > 1 for _, drafts, _ in recorded if len(drafts[0]) == 4)
    assert result.acceptance.joint[1] > 0.2


CHAINS = [name for name, keys in HEADS.items() if draft_limit_of(keys, 5) == 5]


@pytest.mark.parametrize(
    "heads",
    [
        pytest.param(name, marks=[] if name in ("sequential", "chain_trunk") else pytest.mark.slow)
        for name in CHAINS
    ],
)
def test_a_cycle_drafts_as_a_chain_that_has_its_modules_several_times(make_model, recorded, heads):
    model = make_model(heads, trained=True)
    settings = model.mtp_config.model_copy(update={"num_nextn_predict_layers": 5})
    longer = DeepseekV3MTP(model.config, settings)
    longer.load_state_dict(model.state_dict(), strict=False)
    modules = list(model.mtp.layers)
    longer.mtp.layers = torch.nn.ModuleList(modules[k % len(modules)] for k in range(5))
    generate(model, [CYCLE[:9], [5]], Settings(20, draft_depth=5, recycle="cycle"))
    assert len(recorded) > 2
    for known, drafts, logits in recorded:
        for row, tokens in enumerate(known):
            expected = plain_logits(longer.eval(), tokens + drafts[row])
            for depth, drawn in enumerate(logits, start=1):
                want = expected[depth, max(len(tokens) - 2, 0)]
                torch.testing.assert_close(drawn[row], want, rtol=1e-4, atol=1e-4)


def test_independent_heads_end_at_their_depth(make_model):
    assert draft_limit(make_model("sequential"), 4) == 4
    assert draft_limit(make_model("parallel"), 4) == 2
    steps = list(stream(make_model("parallel"), [[5]], Settings(max_new_tokens=12, draft_depth=4)))
    assert max(step.drafted for step in steps) == 2
