"""Overlap against float64 sums over the vocabulary, against drafts that are drawn and verified, and
where it is known.
"""

import math

import pytest
import torch

from dsv3_mtp.decode.sample import TokenSampler
from dsv3_mtp.model import overlap as module
from dsv3_mtp.model.causal_lm import DeepseekV3MTP
from dsv3_mtp.model.output import LossSettings
from dsv3_mtp.model.overlap import overlap_means, overlap_sums, pairs
from dsv3_mtp.model.targets import teacher_slots, valid_targets
from tests.heads_under_test import MODES

T = 12


@pytest.fixture
def build(make_tiny_config):
    def make(mode="sequential", depths=3, dtype=torch.float32):
        config = make_tiny_config({"mtp.mode": mode, "mtp.num_nextn_predict_layers": depths})
        model = DeepseekV3MTP(config.model, config.mtp)
        model.init_weights(3)
        for parameter in model.parameters():
            parameter.data.mul_(3.0)  # or every distribution is nearly uniform
        return model.to(dtype).eval()

    return make


def rows_for(model, *, masked: bool, rows=3):
    torch.manual_seed(1)
    tokens = torch.randint(model.config.vocab_size, (rows, T + model.lookahead))
    documents = (torch.rand(tokens.shape) < 0.15).cumsum(1) if masked else None
    scored = torch.rand(tokens.shape) < 0.8
    return tokens, documents, scored


def parts(model, tokens, documents, scored):
    hiddens = model.head_rows(tokens, documents).by_depth(model.depths)
    valid = valid_targets(tokens, documents, model.offsets, scored)
    taught = teacher_slots(valid, model.offsets)
    nothing = hiddens[0].new_zeros(len(tokens), model.lookahead - 1, model.config.hidden_size)
    return hiddens, nothing, taught


def head_logits(model):
    return model.lm_head.head_logits


def by_hand(model, tokens, documents, scored):
    """Overlap per slot in float64, and the four sums, by loops over rows, slots and depths."""
    probability = model.logits(tokens, documents).double().softmax(-1)  # (1+D, B, T, V)
    sums = torch.zeros(4, model.depths, dtype=torch.float64)
    for row in range(len(tokens)):
        for i in range(T):
            product, all_have_one = 1.0, True
            for k in range(1, 1 + model.depths):
                aim = i + model.offsets[k]
                own = documents is None or documents[row, aim] == documents[row, i]
                has_one = bool(own and scored[row, aim] and aim - 1 < T)
                both = [probability[0, row, aim - 1], probability[k, row, i]] if aim <= T else None
                value = float(torch.minimum(*both).sum()) if both else 0.0
                all_have_one, product = all_have_one and has_one, product * value
                sums[:, k - 1] += torch.tensor(
                    [value * has_one, has_one, product if all_have_one else 0, all_have_one],
                    dtype=torch.float64,
                )
    return sums


@pytest.mark.parametrize(
    ("mode", "elements"),
    [*((mode, 700) for mode in MODES), ("sequential", 1), ("sequential", 2**22)],
)
@pytest.mark.parametrize("masked", [False, True])
@torch.no_grad()
def test_overlap_is_the_sum_over_the_vocabulary_in_float64(
    build, monkeypatch, mode, masked, elements
):
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", elements)
    model = build(mode, dtype=torch.float64)
    rows = rows_for(model, masked=masked)
    hiddens, nothing, taught = parts(model, *rows)
    found = overlap_sums(
        head_logits(model), hiddens, nothing, taught, model.config.vocab_size, model.offsets
    )
    torch.testing.assert_close(found, by_hand(model, *rows), rtol=1e-12, atol=1e-12)
    out = model(*rows, LossSettings(overlap=True))
    torch.testing.assert_close(out.overlap, found, rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_float32_overlap_is_that_of_float64(build):
    found = {}
    for dtype in (torch.float32, torch.float64):
        model = build("sequential", dtype=dtype)
        found[dtype] = model(
            rows_for(model, masked=False)[0], settings=LossSettings(overlap=True)
        ).overlap
    torch.testing.assert_close(found[torch.float32], found[torch.float64], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_row_in_two_parts_has_the_overlap_of_the_whole_row(build):
    model = build("sequential", depths=2)
    rows = rows_for(model, masked=False)
    hiddens, nothing, taught = parts(model, *rows)
    whole = overlap_sums(
        head_logits(model), hiddens, nothing, taught, model.config.vocab_size, model.offsets
    )
    valid, cut = valid_targets(rows[0], None, model.offsets, rows[2]), T // 2
    total = torch.zeros_like(whole)
    for slots, following, count in (
        (slice(0, cut), hiddens[0][:, cut : cut + 2], 2),
        (slice(cut, T), nothing, 0),
    ):
        own = [hiddens[0][:, slots], *(h.cut(slots.start, slots.stop) for h in hiddens[1:])]
        has_one = teacher_slots(valid[:, :, slots], model.offsets, count)
        total += overlap_sums(
            head_logits(model), own, following, has_one, model.config.vocab_size, model.offsets
        )
    torch.testing.assert_close(total, whole)


@pytest.mark.parametrize("temperature", [0.6, 1.0])
@torch.no_grad()
def test_overlap_is_the_share_of_drawn_drafts_that_the_verifier_accepts(build, temperature):
    model, draws = build("sequential", depths=2), 4000
    tokens, *_ = rows_for(model, masked=False, rows=1)
    hiddens, nothing, _ = parts(model, tokens, None, torch.ones_like(tokens, dtype=torch.bool))
    sampler = TokenSampler(temperature, generator=torch.Generator().manual_seed(5))
    logits = model.logits(tokens)[:, 0]  # (1+D, T, V)
    vocab = model.config.vocab_size
    for pair in pairs(
        head_logits(model), hiddens, nothing, vocab, model.offsets, temperature=temperature
    ):
        for n, i in enumerate(range(pair.slots.start, pair.slots.stop)):
            if i + pair.depth >= T:
                continue
            draft, q = sampler.draw(logits[pair.depth, i].expand(draws, -1))
            both = torch.stack([logits[0, i + pair.depth]] * 2).expand(draws, -1, -1)
            accepted, _ = sampler.verify(both, draft[:, None], q[:, None])
            expected = float(pair.overlap[0, n])
            error = math.sqrt(max(expected * (1 - expected), 1e-4) / draws)
            assert float(accepted.double().mean()) == pytest.approx(expected, abs=4.5 * error)


def test_equal_distributions_overlap_wholly_and_disjoint_ones_not_at_all():
    hidden = torch.tensor([[[0.0, 0.0], [-200.0, 0.0], [-200.0, 0.0]]])
    taught = torch.ones(1, 1, 3, dtype=torch.bool)
    taught[:, :, 2] = False
    nothing = torch.zeros(1, 1, 2)
    same = overlap_sums(lambda _, x: x, [hidden, hidden.roll(-1, 1)], nothing, taught, 2, (1, 2))
    assert overlap_means(same.tolist()) == {"overlap/1": 1.0, "overlap/tokens_per_step": 2.0}
    turned = torch.tensor([[[0.0, -200.0]] * 3])
    none = overlap_sums(lambda _, x: x, [hidden, turned], nothing, taught, 2, (1, 2))
    assert (
        overlap_means(none.tolist())["overlap/1"] < 1e-80
        or overlap_means(none.tolist())["overlap/1"] == 0
    )
