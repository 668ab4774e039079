"""Statistics of drafts and table drafters against sums by hand, and where they are known."""

import pytest
import torch

from dsv3_mtp.model.causal_lm import DeepseekV3MTP
from dsv3_mtp.model.targets import teacher_slots, valid_targets
from dsv3_mtp.train.drafts import DraftStatistics, TableDrafters

T = 12


@torch.no_grad()
def test_draft_statistics_are_those_by_hand(make_tiny_config):
    config = make_tiny_config({"mtp.num_nextn_predict_layers": 2})
    model = DeepseekV3MTP(config.model, config.mtp)
    model.init_weights(3)
    for parameter in model.parameters():
        parameter.data.mul_(3.0)  # or every distribution is nearly uniform
    model = model.double().eval()
    torch.manual_seed(1)
    tokens = torch.randint(model.config.vocab_size, (3, T + 3))
    rows = tokens, (torch.rand(tokens.shape) < 0.15).cumsum(1)
    hiddens = model.head_rows(*rows).by_depth(model.depths)
    scored = torch.rand(tokens.shape) < 0.8
    taught = teacher_slots(valid_targets(*rows, model.offsets, scored), model.offsets)
    vocab = model.config.vocab_size
    statistics = DraftStatistics((2, 3), vocab, temperature=0.7, device=torch.device("cpu"))
    sure = torch.rand(2, 3, T, dtype=torch.float64)
    statistics.add(model.lm_head.head_logits, hiddens, rows[0], taught, sure)
    found = statistics.metrics()
    probability = (model.logits(*rows[:2]) / 0.7).softmax(-1)
    for k in (1, 2):
        slots = [(b, i) for b in range(3) for i in range(T - k) if taught[k - 1, b, i]]
        p = torch.stack([probability[0, b, i + k] for b, i in slots])
        q = torch.stack([probability[k, b, i] for b, i in slots])
        label = torch.tensor([int(rows[0][b, i + k + 1]) for b, i in slots])
        overlap, top = torch.minimum(p, q).sum(-1), q.max(-1).values
        assert found[f"drafts/kl/{k}"] == pytest.approx(float((p * (p / q).log()).sum(-1).mean()))
        assert found[f"drafts/overlap/{k}"] == pytest.approx(float(overlap.mean()))
        rank = (q > q.gather(1, p.argmax(-1, keepdim=True))).sum(-1)
        assert found[f"drafts/coverage_4/{k}"] == pytest.approx(float((rank < 4).double().mean()))
        for threshold in (0.0, 0.2, 0.4):
            kept = top >= threshold
            if kept.any():
                assert found[f"drafts/kept_{threshold}/{k}"] == pytest.approx(
                    float(kept.double().mean())
                )
                assert found[f"drafts/accepted_{threshold}/{k}"] == pytest.approx(
                    float(overlap[kept].mean())
                )
        for name, hit in (("label", q.argmax(-1) == label), ("main", q.argmax(-1) == p.argmax(-1))):
            gaps = 0.0
            for number in range(10):
                chosen = (top >= number / 10) & (top < (number + 1) / 10)
                gaps += abs(float((top[chosen] - hit[chosen].double()).sum()))
            assert found[f"drafts/ece_{name}/{k}"] == pytest.approx(gaps / len(slots))
        own = torch.stack([sure[k - 1, b, i] for b, i in slots])
        assert found[f"drafts/confidence/{k}"] == pytest.approx(float(own.mean()))
        tenth = (own * 10).long()
        gaps = sum(abs(float((own - overlap)[tenth == n].sum())) for n in range(10))
        assert found[f"drafts/ece_confidence/{k}"] == pytest.approx(gaps / len(slots))


@pytest.mark.parametrize("reads_tokens", [True, False])
def test_a_table_drafter_is_perfect_where_the_main_model_is_that_table(reads_tokens):
    """A main model that looks at its last token alone: a table of t_{i+k} has all of it; a table of
    t_i has what two steps of the chain leave.
    """
    vocab, torch_rows = 5, torch.Generator().manual_seed(2)
    chain = torch.rand(vocab, vocab, generator=torch_rows).mul(3).softmax(-1)
    tokens = torch.zeros(400, 33, dtype=torch.long)
    for i in range(32):
        tokens[:, i + 1] = torch.multinomial(chain[tokens[:, i]], 1, generator=torch_rows)[:, 0]
    tokens, length = tokens[:, 1:], 30
    hidden = torch.nn.functional.one_hot(tokens[:, :length], vocab).float()

    def logits(_depth, x):
        return (x @ chain).log()

    tables = TableDrafters([int(reads_tokens)], [2], vocab, device=torch.device("cpu"))
    tables.fit(logits, hidden[:300], tokens[:300])
    taught = teacher_slots(torch.ones(2, 100, length, dtype=torch.bool), (1, 2))
    overlaps = tables.overlaps(logits, hidden[300:], tokens[300:], taught)
    found = {name: float(part[0][taught[0]].mean()) for name, part in overlaps.items()}
    pi = torch.linalg.matrix_power(chain, 60)[0]
    constant = (pi[:, None] * torch.minimum(chain, pi[None] @ chain)).sum()
    two_steps = chain @ chain
    skip = (
        pi[:, None, None] * chain[:, :, None] * torch.minimum(chain[None], two_steps[:, None])
    ).sum()
    assert found["constant"] == pytest.approx(float(constant), abs=0.02)
    assert found["table"] == pytest.approx(1.0 if reads_tokens else float(skip), abs=0.02)
