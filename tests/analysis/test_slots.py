"""What is read slot by slot against the logits of every head, by hand, and the groups against
loops.
"""

import numpy as np
import pytest
import torch

from dsv3_mtp.analysis.groups import entropy_groups, position_groups, rows_of
from dsv3_mtp.analysis.slots import read_slots
from dsv3_mtp.data.ngrams import NGrams
from dsv3_mtp.model.causal_lm import DeepseekV3MTP
from dsv3_mtp.model.moe import MoE
from tests.made_runs import randomise

T, CPU = 10, torch.device("cpu")


@pytest.fixture(scope="module", params=["sequential", "parallel", "leap"])
def read(request, make_tiny_config):
    keys = {"mtp.mode": request.param, "mtp.num_nextn_predict_layers": 2, "data.seq_len": T}
    keys |= {"data.mask_documents": True, "train.dtype": "float32"}
    config = make_tiny_config(keys)
    model = randomise(DeepseekV3MTP(config.model, config.mtp)).eval()
    random = np.random.default_rng(5)
    shape = (3, T + model.lookahead)
    tokens = random.integers(0, 64, shape)
    documents = (random.random(shape) < 0.15).cumsum(1)
    tables = NGrams(random.integers(0, 64, (20, T + 1)), None, vocab_size=64)
    windows = [(tokens[:2], documents[:2]), (tokens[2:], documents[2:])]
    slots = read_slots(model, windows, config, device=CPU, trigrams=tables)
    return model, tokens, documents, slots


@torch.no_grad()
def test_loss_entropy_and_overlap_are_those_of_the_logits(read):
    model, tokens, documents, slots = read
    rows = torch.from_numpy(tokens), torch.from_numpy(documents)
    p = model.logits(*rows).double().softmax(-1)  # (1+D, B, T, V)
    loss, entropy = slots.array("loss"), slots.array("entropy")
    for b in range(3):
        for j in range(T):
            assert loss[b, j] == pytest.approx(-float(p[0, b, j, tokens[b, j + 1]].log()), abs=1e-5)
            own = p[0, b, j]
            assert entropy[b, j] == pytest.approx(-float((own * own.log()).sum()), abs=1e-5)
            same = documents[b, j + 1] == documents[b, j]
            assert slots.array("valid")[b, j] == same
            for k in (1, 2):
                i = j + 1 - model.offsets[k]
                taught = i >= 0 and documents[b, i] == documents[b, j + 1]
                assert slots.array("taught")[b, k - 1, j] == taught, (b, j, k)
                if taught:
                    overlap = float(torch.minimum(p[k, b, i], own).sum())
                    assert slots.array("overlap")[b, k - 1, j] == pytest.approx(overlap, abs=1e-5)


@torch.no_grad()
def test_the_states_are_those_that_the_main_head_reads(read):
    model, tokens, documents, slots = read
    rows = torch.from_numpy(tokens), torch.from_numpy(documents)
    logits = model.lm_head(torch.from_numpy(slots.array("states")))
    torch.testing.assert_close(logits, model.logits(*rows)[0], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_experts_are_those_that_the_loads_count(read):
    model, tokens, documents, slots = read
    if not slots.head_experts:
        assert model.mtp_config.mode == "leap"  # it has no router
        return
    output = model.head_rows(torch.from_numpy(tokens), torch.from_numpy(documents))
    loads = torch.stack([stats.load for stats in output.routed]).numpy()
    trunk, heads = slots.array("trunk_experts"), slots.array("head_experts")
    layers = [n for n, layer in enumerate(model.model.layers) if isinstance(layer.mlp, MoE)]
    assert trunk.shape[1] == len(layers)
    for number in range(len(layers)):
        assert np.bincount(trunk[:, number].ravel(), minlength=8).tolist() == loads[number].tolist()
    for k in (1, 2):
        kept = heads[:, k - 1, k:]  # what slots T - k .. T - 1 chose belongs to no main slot
        assert (heads[:, k - 1, :k] == -1).all() and (kept >= 0).all()
        counted = np.bincount(kept.ravel(), minlength=8)
        assert (counted <= loads[len(layers) + k - 1]).all() and counted.sum() == 3 * (T - k) * 2


def test_a_models_routers_are_left_as_they_were(read):
    assert not any(gate._forward_hooks for gate in read[0].gates())


def test_groups_are_means_over_their_slots(read):
    *_, slots = read
    names, group = entropy_groups(slots.array("entropy"))
    found, loss = rows_of(slots, names, group), slots.array("loss")
    for number, name in enumerate(names):
        inside = [
            (b, j)
            for b in range(3)
            for j in range(T)
            if group[b, j] == number and slots.array("valid")[b, j]
        ]
        assert (name in found) == bool(inside)
        if inside:
            row = found[name]
            assert row["main_loss"].mean == pytest.approx(np.mean([loss[at] for at in inside]))
            assert row["share"].mean == pytest.approx(len(inside) / slots.array("valid").sum())
            trigram = np.mean([slots.array("trigram")[at] for at in inside])
            assert row["trigram"].mean == pytest.approx(trigram)
            drafts = [at for at in inside if slots.array("taught")[at[0], 0, at[1]]]
            if drafts:
                overlap = np.mean([slots.array("overlap")[b, 0, j] for b, j in drafts])
                assert row["overlap/1"].mean == pytest.approx(overlap)
    same = rows_of(slots, names, group, slots)
    assert all(row["main_loss_minus"].mean == 0 for row in same.values())


def test_bins_are_where_their_names_say():
    names, group = entropy_groups(np.array([[-1e-17, 0.49, 0.5, 2.9, 3.0, 9.0]]))
    assert [names[n] for n in group[0]] == [
        *("0 to 0.5", "0 to 0.5", "0.5 to 1", "2 to 3", "3 to 4", "4 or more")
    ]
    names, group = position_groups(2, 9)
    assert names == ["0", "1", "2 to 3", "4 to 7", "8"]
    assert [names[n] for n in group[1]][:5] == ["0", "1", "2 to 3", "2 to 3", "4 to 7"]
