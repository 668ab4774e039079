"""The whole model: alignment, leaks, sharing, recombination, the plain language model inside, sizes
of the paper.
"""

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from bench.meter import Meter
from dsv3_mtp.config import load_config
from dsv3_mtp.model import causal_lm
from dsv3_mtp.model.causal_lm import DeepseekV3MTP
from dsv3_mtp.model.layers import RMSNorm, rotary_angles
from dsv3_mtp.model.output import LossSettings
from dsv3_mtp.model.size import model_size
from dsv3_mtp.model.states import Scores
from dsv3_mtp.model.targets import agreement, count_targets, target_tokens, valid_targets
from tests.heads_under_test import HEADS, MODES

CONFIGS = Path(__file__).parents[2] / "configs"
T = 10


@pytest.fixture
def build(make_tiny_config):
    def make(depths=2, dtype=torch.float32, **overrides):
        config = make_tiny_config({"mtp.num_nextn_predict_layers": depths, **overrides})
        model = DeepseekV3MTP(config.model, config.mtp)
        model.init_weights(3)
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):  # 1 would hide a norm in the wrong place
                parameter.data.uniform_(0.5, 1.5)
        return model.to(dtype)

    return make


def tokens_for(model, rows=2):
    return torch.randint(model.config.vocab_size, (rows, T + model.lookahead))


@pytest.mark.parametrize("depths", [1, 2, 3, 4])
def test_alignment_is_the_closed_form_on_arange_tokens(build, depths):
    model = build(depths)
    seen = {}
    model.mtp.register_forward_pre_hook(lambda _, args: seen.update(inputs=args[0]))
    tokens = torch.arange(T + 1 + depths).unsqueeze(0)
    out = model(tokens)
    targets = target_tokens(tokens, model.offsets)[:, 0]
    for depth in range(1 + depths):
        assert targets[depth].tolist() == [i + depth + 1 for i in range(T)]
        if depth:
            expected = model.model.embed_tokens(torch.arange(T) + depth)
            assert torch.equal(seen["inputs"].ahead(depth)[0], expected)
    assert out.targets.tolist() == [T] * (1 + depths)


@pytest.mark.parametrize("variant", HEADS)
def test_no_leak_from_future_tokens(build, variant, monkeypatch):
    """Perturbing t_{i+k+1} or later never changes depth k at slot i; t_{i+k} does, where the head
    reads it. In training, but a head draws the same numbers whatever the tokens of the row are.
    """
    monkeypatch.setattr(
        causal_lm, "row_keys", lambda tokens, *_, **__: torch.arange(tokens.numel()).view_as(tokens)
    )
    model = build(3, torch.float64, **HEADS[variant])
    tokens = tokens_for(model, rows=1)
    base = model.logits(tokens)  # (1+D, 1, T, V)
    horizons = [0, *(model.mtp.horizon(model.mtp_config, k) for k in (1, 2, 3))]
    for position in range(1, tokens.shape[1]):
        changed = tokens.clone()
        changed[0, position] = (tokens[0, position] + 1) % model.config.vocab_size
        moved = ((model.logits(changed) - base).abs() > 1e-9).any(-1)[:, 0]  # (1+D, T)
        for depth in range(4):
            first = position - horizons[depth]  # the slot whose farthest input is this token
            assert not moved[depth, : max(first, 0)].any(), (depth, position)
            if 0 <= first < T:
                assert moved[depth, first], (depth, position)


def reference_losses(model, tokens, weights, copies=None):
    """Eqs. 21-25 written out for sequential modules, float64; `copies` = separate (embedding, head)
    per depth.
    """
    depths = model.depths
    copies = copies or [(model.model.embed_tokens.weight, model.lm_head.weight)] * (1 + depths)
    angles = rotary_angles(model.config, torch.arange(T))
    trunk, _ = model.model(F.embedding(tokens[:, :T], copies[0][0]), angles, None)
    h, losses = trunk.post_norm, []
    for k in range(1 + depths):
        if k:
            module = model.mtp.layers[k - 1]
            e = F.embedding(tokens[:, k : k + T], copies[k][0])
            merged = torch.cat([module.enorm(e), module.hnorm(h)], -1) @ module.eh_proj.weight.T
            x = merged + module.self_attn(module.input_layernorm(merged), angles, None)
            h = module.shared_head.norm(x + module.mlp(module.post_attention_layernorm(x))[0])
        logits = h @ copies[k][1].T
        losses.append(F.cross_entropy(logits.flatten(0, 1), tokens[:, k + 1 : k + 1 + T].flatten()))
    return losses[0] + sum(w * loss for w, loss in zip(weights, losses[1:], strict=True)), losses


def test_losses_and_gradients_equal_the_equations_written_out(build):
    model = build(2, torch.float64)
    tokens, weights = tokens_for(model), (0.2, 0.05)
    out = model(tokens, settings=LossSettings(weights))
    expected, parts = reference_losses(model, tokens, weights)
    assert out.loss.item() == pytest.approx(expected.item(), rel=1e-12)
    assert (out.nll_sum / out.targets).tolist() == pytest.approx(
        [p.item() for p in parts], rel=1e-12
    )
    parameters = list(model.parameters())
    got = torch.autograd.grad(out.loss, parameters)
    want = torch.autograd.grad(expected, parameters)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_shared_embedding_and_head_gradients_are_the_sum_over_separate_copies(build):
    model = build(2, torch.float64)
    tokens, weights = tokens_for(model), (0.3, 0.3)
    model(tokens, settings=LossSettings(weights)).loss.backward()
    shared = model.model.embed_tokens.weight, model.lm_head.weight
    copies = [tuple(w.detach().clone().requires_grad_() for w in shared) for _ in range(3)]
    reference_losses(model, tokens, weights, copies)[0].backward()
    for which in range(2):
        total = sum(pair[which].grad for pair in copies)
        assert all(pair[which].grad.norm() > 0 for pair in copies)
        torch.testing.assert_close(shared[which].grad, total, rtol=1e-9, atol=1e-12)


def test_embedding_and_head_are_one_storage_for_all_depths(build):
    model = build(3)
    names = [name for name, _ in model.named_parameters()]
    assert [n for n in names if "embed_tokens" in n or "lm_head" in n] == [
        "model.embed_tokens.weight",
        "lm_head.weight",
    ]
    rows = model.head_rows(tokens_for(model)).rows
    assert all(one.outputs == (model.lm_head,) for one in rows) and len(rows) == 4


@pytest.mark.parametrize("variant", HEADS)
def test_the_loss_recombines_from_what_is_reported(build, variant):
    model = build(2, **HEADS[variant])
    out = model(tokens_for(model), settings=LossSettings((0.15, 0.05), 0.01))
    mean = out.nll_sum / out.targets
    total = mean[0] + 0.15 * mean[1] + 0.05 * mean[2] + 0.01 * out.balance / 2
    for factor, value in zip(model.loss.terms.values(), out.term_sum / out.term_count, strict=True):
        total = total + factor * value
    assert out.loss.item() == pytest.approx(total.item(), rel=1e-6)


def test_mode_none_is_the_plain_language_model_bit_for_bit(build):
    plain, mtp = build(**{"mtp.mode": "none"}), build(2)
    mtp.model.load_state_dict(plain.model.state_dict())
    mtp.lm_head.load_state_dict(plain.lm_head.state_dict())
    tokens = torch.randint(64, (2, T + 3))
    out = plain(tokens[:, : T + 1])
    logits = plain.lm_head(plain.head_rows(tokens[:, : T + 1]).rows[0].inputs[0])
    assert torch.equal(mtp.logits(tokens)[0], logits)
    torch.testing.assert_close(
        out.loss,
        F.cross_entropy(logits.flatten(0, 1), tokens[:, 1 : T + 1].flatten()),
        rtol=1e-6,
        atol=1e-6,
    )
    assert out.agreed.numel() == 0 and out.nll_sum.shape == (1,)
    weighted = mtp(tokens, settings=LossSettings((0.0, 0.0)))
    out.loss.backward()
    weighted.loss.backward()
    for (name, a), (_, b) in zip(plain.named_parameters(), mtp.named_parameters(), strict=False):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-7, msg=name)


def test_the_trunk_starts_the_same_whatever_the_heads(build, make_tiny_config):
    states = []
    for mode in ("none", *MODES):
        config = make_tiny_config({"mtp.mode": mode, "mtp.num_nextn_predict_layers": 2})
        model = DeepseekV3MTP(config.model, config.mtp)
        model.init_weights(5)
        states.append(model.model.state_dict() | {"head": model.lm_head.weight})
    for other in states[1:]:
        assert all(torch.equal(states[0][key], other[key]) for key in states[0])


def test_init_is_normal_with_the_configured_range_and_norms_are_one(make_tiny_config):
    config = make_tiny_config(
        {"model.initializer_range": 0.006, "model.hidden_size": 64, "model.vocab_size": 512}
    )
    model = DeepseekV3MTP(config.model, config.mtp)
    model.init_weights(0)
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            assert (parameter == 1).all(), name
        elif parameter.numel() > 2000:
            assert parameter.std().item() == pytest.approx(0.006, rel=0.1), name
            assert abs(parameter.mean().item()) < 5e-4, name


@pytest.mark.parametrize("detach", ["none", "trunk", "all"])
@pytest.mark.parametrize("mode", MODES)
def test_detach_stops_exactly_the_gradients_it_names(build, mode, detach):
    model = build(2, **{"mtp.mode": mode, "mtp.detach": detach})
    tokens = tokens_for(model)
    before = copy.deepcopy(model)
    before.loss.terms, before.loss.compared = {}, []  # what the heads own is not the main loss
    model(tokens, settings=LossSettings((1.0, 1.0))).loss.backward()
    before(tokens, settings=LossSettings((0.0, 0.0))).loss.backward()
    trunk_moved = not torch.allclose(
        model.model.layers[0].mlp.up_proj.weight.grad,
        before.model.layers[0].mlp.up_proj.weight.grad,
        atol=1e-9,
    )
    head_moved = not torch.allclose(
        model.lm_head.weight.grad, before.lm_head.weight.grad, atol=1e-9
    )
    shared = any(model.lm_head in rows.outputs for rows in model.head_rows(tokens).rows[1:])
    assert trunk_moved == (detach == "none")
    assert head_moved == (detach != "all" and shared)
    assert all(
        p.grad is not None and p.grad.abs().sum() > 0
        for n, p in model.mtp.named_parameters()
        if p.ndim == 2
    )


def test_the_chain_carries_gradient_from_depth_two_to_module_one(build):
    tokens = None
    for chain, reaches in (("hidden", True), ("trunk", False)):
        model = build(2, **{"mtp.chain": chain, "mtp.detach": "all"})
        tokens = tokens_for(model) if tokens is None else tokens
        model(tokens, settings=LossSettings((0.0, 1.0))).loss.backward()
        assert (model.mtp.layers[0].eh_proj.weight.grad.abs().sum() > 0) == reaches


def test_eh_proj_reads_the_embedding_half_first(build):
    model = build(1)
    module = model.mtp.layers[0]
    hidden, embedding = torch.randn(1, 4, 32), torch.randn(1, 4, 32)
    left, right = module.eh_proj.weight.chunk(2, dim=1)
    expected = module.enorm(embedding) @ left.T + module.hnorm(hidden) @ right.T
    torch.testing.assert_close(module.merge(hidden, embedding), expected)


def test_parallel_heads_read_the_input_of_the_trunks_last_layer(build):
    model = build(2, **{"mtp.mode": "parallel"})
    head = model.mtp.layers[0]
    head.load_state_dict(
        model.model.layers[-1].state_dict() | {"shared_head.norm.weight": model.model.norm.weight},
        strict=True,
    )
    logits = model.logits(tokens_for(model))
    assert torch.equal(logits[1], logits[0])  # with the last layer's weights, head 2 is head 1


def test_one_recycled_module_counts_its_load_for_every_depth_and_its_balance_loss_once(build):
    shared = build(3, **{"mtp.share_weights": True})
    assert len(shared.mtp.layers) == 1 and len(shared.gates()) == 3
    tokens = tokens_for(shared)
    out = shared(tokens)
    assert out.load.shape == (3, 8)
    assert out.load.sum(1).tolist() == [2 * T * 2, 2 * T * 2, 3 * 2 * T * 2]
    separate = build(3)
    for module in separate.mtp.layers:
        module.load_state_dict(shared.mtp.layers[0].state_dict())
    separate.model.load_state_dict(shared.model.state_dict())
    per_depth = separate.head_rows(tokens).routed[2:]
    only_mtp = shared.head_rows(tokens).routed[2].balance
    torch.testing.assert_close(only_mtp, sum(s.balance for s in per_depth) / 3)


def test_mtp_routers_move_like_the_trunks(build):
    model = build(2)
    out = model(tokens_for(model))
    model.update_router_bias(out.load, 0.01)
    assert len(model.gates()) == 4
    for gate, load in zip(model.gates(), out.load, strict=True):
        assert torch.equal(gate.e_score_correction_bias, 0.01 * torch.sign(load.mean() - load))


# documents


def test_masked_documents_give_the_losses_of_each_document_alone(build):
    model = build(2, torch.float64)
    lengths = [5, 1, 4, 3]  # fills T + 1 + D = 13
    documents = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths)).unsqueeze(0)
    tokens = torch.randint(64, (1, sum(lengths)))
    out = model(tokens, documents)
    nll, count = torch.zeros(3, dtype=torch.float64), torch.zeros(3)
    for start, length in zip([0, 5, 6, 10], lengths, strict=True):
        own = tokens[:, start : start + length]
        for depth in range(3):
            # of depth k in a document of n tokens: n-1-k
            slots = min(length - 1 - depth, T - start)
            if slots > 0:
                # lookahead that no counted slot reads
                padded = torch.cat([own, own.new_zeros(1, 2)], 1)
                logits = model.logits(padded)[depth, 0, :slots]
                nll[depth] += F.cross_entropy(
                    logits, own[0, depth + 1 : depth + 1 + slots], reduction="sum"
                )
                count[depth] += slots
    assert out.targets.tolist() == count.tolist()
    torch.testing.assert_close(out.nll_sum, nll, rtol=1e-10, atol=1e-10)


def test_valid_targets_stay_inside_the_slots_document():
    documents = torch.tensor([[0, 0, 0, 1, 1, 2, 3, 3]])
    tokens = torch.zeros(1, 8)
    valid = valid_targets(tokens, documents, range(1, 4))[:, 0]  # T = 5
    assert valid.int().tolist() == [[1, 1, 0, 1, 0], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0]]
    assert count_targets(tokens, documents, range(1, 4)).tolist() == [3, 1, 0, 1]
    assert count_targets(tokens, None, range(1, 4)).tolist() == [5, 5, 5, 1]


def test_a_micro_batch_without_valid_targets_gives_zero_loss_and_finite_gradients(build):
    model = build(1)
    tokens = tokens_for(model)
    documents = torch.arange(tokens.shape[1]).expand_as(tokens)  # every token its own document
    out = model(tokens, documents)
    out.loss.backward()
    assert out.loss.item() == 0 and out.targets.tolist() == [0, 0]
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("masked", [False, True])
def test_one_batch_equals_its_micro_batches_with_uneven_valid_counts(build, masked):
    model = build(2, torch.float64)
    tokens = tokens_for(model, rows=4)
    documents = None
    if masked:  # rows with 1, 2, 3 and 4 documents
        documents = torch.stack(
            [torch.arange(tokens.shape[1]) * n // tokens.shape[1] for n in (1, 2, 3, 4)]
        )
    rows = [slice(0, 1), slice(1, 2), slice(2, 4)]
    part = (lambda s: None) if documents is None else (lambda s: documents[s])
    whole = model(tokens, documents, settings=LossSettings((0.3, 0.1), 0.01))
    parameters = list(model.parameters())
    want = torch.autograd.grad(whole.loss, parameters)
    normalizer = sum(count_targets(tokens[s], part(s), range(1, 4)) for s in rows)
    outs = [
        model(tokens[s], part(s), settings=LossSettings((0.3, 0.1), 0.01, normalizer)) for s in rows
    ]
    got = torch.autograd.grad(sum(out.loss for out in outs), parameters)
    assert sum(out.loss for out in outs).item() == pytest.approx(whole.loss.item(), rel=1e-12)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


# metrics


def test_agreement_by_hand():
    #        slots:           0  1  2  3
    # main, depth 1, depth 2
    prediction = torch.tensor([[[5, 6, 7, 8]], [[6, 7, 9, 0]], [[7, 8, 0, 0]]])
    every = torch.ones(3, 1, 4, dtype=torch.bool)
    agreed, compared = agreement(prediction, every, prediction[0], (1, 2, 3))
    # depth 1: slot i against main i+1: 6=6, 7=7, 9!=8 -> 2 of 3; depth 2 jointly: 7=7, 8=8 -> 2 of
    # 2
    assert (agreed.tolist(), compared.tolist()) == ([2, 2], [3, 2])
    prediction[1, 0, 0] = 1  # depth 1 wrong at slot 0: depth 2 no longer counts there
    assert agreement(prediction, every, prediction[0], (1, 2, 3))[0].tolist() == [1, 1]


def test_a_model_that_is_right_everywhere_agrees_everywhere_also_where_few_tokens_are_scored():
    tokens = torch.arange(9)[None]  # T = 6, D = 2
    scored = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 0, 0]]).bool()
    right = torch.stack([tokens[:, k + 1 : k + 7] for k in range(3)])
    valid = valid_targets(tokens, None, (1, 2, 3), scored)
    agreed, compared = agreement(right, valid, right[0], (1, 2, 3))
    # no slot has t_4 at depth 1 and t_3 ahead of it as a target
    assert agreed.tolist() == compared.tolist() == [3, 2]


def test_top1_counts_argmax_hits_per_depth(build):
    model = build(2)
    tokens = tokens_for(model)
    out, logits = model(tokens), model.logits(tokens)
    for depth in range(3):
        hits = (logits[depth].argmax(-1) == tokens[:, depth + 1 : depth + 1 + T]).sum()
        assert out.correct[depth] == hits


# sizes: the paper's numbers (references: V3 section 4.2, README_WEIGHTS, DeepSeek-V2 appendix B)


def size_of(name):
    config = load_config(CONFIGS / name)
    with torch.device("meta"):
        return model_size(DeepseekV3MTP(config.model, config.mtp), 4096)


def test_v3_671b_has_the_papers_parameter_counts_and_flops():
    size = size_of("v3_671b.yaml")
    assert size.total / 1e9 == pytest.approx(671.03, abs=0.005)
    assert size.active / 1e9 == pytest.approx(37.55, abs=0.005)
    assert (size.active - size.embedding) / 1e9 == pytest.approx(36.63, abs=0.01)
    assert size.mtp_total / 1e9 == pytest.approx(11.61, abs=0.005)
    # 250.4 without the MTP module
    assert size.flops_per_token / 1e9 == pytest.approx(260.6, abs=0.2)


def test_v3_16b_has_v2_lites_parameter_counts():
    size = size_of("v3_16b.yaml")
    assert size.total / 1e9 == pytest.approx(15.706, abs=0.001)
    assert (size.active - size.embedding) / 1e9 == pytest.approx(2.45, abs=0.01)


@pytest.mark.parametrize("variant", HEADS)
def test_counts_equal_the_parameters_that_exist(build, variant):
    model = build(2, **HEADS[variant])
    size = model_size(model, T)
    assert size.total + size.mtp_total == sum(p.numel() for p in model.parameters())
    assert 0 < size.active < size.total


def test_a_depth_with_fewer_targets_than_ranks_weighs_as_on_one_rank(build):
    model = build(2, torch.float64)
    tokens = tokens_for(model, rows=4)
    documents = torch.arange(T + 3).expand(4, -1) // 2  # two tokens each: no target of depth 1
    documents = documents.clone()
    documents[0, 2] = 0  # but this one, of three; depth 2 has none anywhere
    counts = count_targets(tokens, documents, range(1, 4))
    assert counts[1:].tolist() == [1, 0, 4]
    whole = model(tokens, documents).loss
    parts = [
        model(*rows, settings=LossSettings(normalizer=counts / 4)).loss
        for rows in zip(tokens.split(1), documents.split(1), strict=True)
    ]
    assert sum(parts).item() / 4 == pytest.approx(whole.item(), rel=1e-12)


@pytest.mark.parametrize(
    ("frozen", "detach"),
    [
        (False, "none"),
        (False, "trunk"),
        pytest.param(False, "all", marks=pytest.mark.slow),
        (True, "trunk"),
        pytest.param(True, "all", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("variant", HEADS)
def test_flops_are_those_that_torch_counts(build, variant, frozen, detach):
    # With a frozen trunk the gradient of the main head's rows is computed beside that of the
    # others, and not used.
    sizes = {"model.hidden_size": 128, "model.vocab_size": 64 if frozen else 256}
    model = build(2, **HEADS[variant], **{"mtp.detach": detach}, **sizes)
    if frozen:
        if not model.mtp.has_weights(model.config, model.mtp_config):
            pytest.skip("the config refuses it: nothing would learn")
        model.freeze_trunk()
    tokens = tokens_for(model)
    # torch counts addmm alone
    in_place = {torch.ops.aten.addmm_: lambda _, a, b, **__: 2 * a[0] * a[1] * b[1]}
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        model(tokens).loss.backward()
    planned = model_size(model, 0).flops_per_token  # 0: it has no entry for attention on a CPU
    assert counter.get_total_flops() / (2 * T) == pytest.approx(planned, rel=0.02)


def test_scored_tokens_are_the_targets_of_every_depth_by_hand():
    # one example of T = 8, D = 2:  slot   0 1 2 3 4 5 6 7
    #                               token  1 1 2 2 3 0 2 1 2 p p
    # suffix sums: 1 1 2 2 = 0 2 1 2, then padding
    tokens = torch.tensor([[1, 1, 2, 2, 3, 0, 2, 1, 2, 4, 4]])
    scored = torch.tensor([[0, 0, 0, 0, 0, 1, 1, 1, 1, 0, 0]]).bool()
    by_hand = [
        [0, 0, 0, 0, 1, 1, 1, 1],  # depth 0 at slot i: token i + 1
        [0, 0, 0, 1, 1, 1, 1, 0],  # depth 1: token i + 2, the last slot's is padding
        [0, 0, 1, 1, 1, 1, 0, 0],  # depth 2: token i + 3
    ]
    assert valid_targets(tokens, None, range(1, 4), scored).int().squeeze(1).tolist() == by_hand
    assert count_targets(tokens, None, range(1, 4), scored).tolist() == [4, 4, 4, 1]


def test_scored_tokens_count_only_inside_their_own_document_by_hand():
    # two examples of 3 tokens and padding, T = 6, D = 1; the last two tokens of each example are
    # scored
    tokens = torch.tensor([[5, 6, 7, 5, 6, 7, 9, 9]])
    documents = torch.tensor([[0, 0, 0, 1, 1, 1, 2, 2]])
    scored = torch.tensor([[0, 1, 1, 0, 1, 1, 0, 0]]).bool()
    by_hand = [
        [1, 1, 0, 1, 1, 0],  # depth 0: slot 2 would predict the next example's first token
        [1, 0, 0, 1, 0, 0],  # depth 1: slot 2 would predict 6, scored, but of the next example
    ]
    assert (
        valid_targets(tokens, documents, range(1, 3), scored).int().squeeze(1).tolist() == by_hand
    )
    assert count_targets(tokens, documents, range(1, 3), scored).tolist() == [4, 2, 1]


@pytest.mark.parametrize("variant", HEADS)
def test_tokens_that_are_not_scored_change_neither_loss_nor_gradient_as_targets(build, variant):
    model = build(**HEADS[variant])
    tokens = tokens_for(model)
    scored = torch.zeros_like(tokens, dtype=torch.bool)
    scored[:, 5:8] = True
    weight = 0.2
    out = model(tokens, scored=scored, settings=LossSettings((weight, weight)))
    assert out.targets.tolist() == [6, 6, 6]
    out.loss.backward()
    got = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    nll, want = whole_losses(model, tokens, scored, (weight, weight))
    assert out.nll_sum.tolist() == pytest.approx(nll, rel=1e-5)
    want.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(got[name], parameter.grad, rtol=1e-4, atol=1e-6)


def whole_losses(model, tokens, scored, weights):
    """By the definition of a depth, on logits of all slots at once: slot i of depth k is scored
    against t_{i+offset}. The summed nll of each depth, and the loss.
    """
    output, logits = model.head_rows(tokens), model.logits(tokens)  # (1+D, B, T, V)
    targets = torch.stack([tokens[:, o:][:, :T] for o in model.offsets])
    valid = torch.stack([scored[:, o:][:, :T] for o in model.offsets])
    nll = -logits.log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    sums, counts = (nll * valid).sum((1, 2)), valid.sum((1, 2))
    loss = (sums / counts * torch.tensor([1.0, *weights])).sum()
    if model.loss.terms:
        taught, overlap = valid[1:].clone(), torch.zeros(valid[1:].shape, dtype=logits.dtype)
        p = logits.detach().softmax(-1)
        for k, offset in enumerate(model.offsets[1:]):
            taught[k, :, T - offset + 1 :] = False
            overlap[k, :, : T - offset + 1] = (
                p[k + 1, :, : T - offset + 1].minimum(p[0, :, offset - 1 :]).sum(-1)
            )
        scores = Scores(nll.detach(), logits.argmax(-1), targets, valid, taught, overlap)
        found = model.mtp.loss_terms(output, scores)
        count = model.mtp.count_terms(model.mtp_config, valid, taught)
        for (name, factor), times in zip(model.loss.terms.items(), count, strict=True):
            loss = loss + factor * found[name] / times
    return sums.tolist(), loss


def test_a_bare_call_weighs_the_heads_as_the_model_s_own_mtp_section_says(build):
    """Lambda of the V3 schedule at the start of a run: 0.3, over D = 2 depths."""
    model = build(2, torch.float64)
    tokens = tokens_for(model)
    mean = (out := model(tokens)).nll_sum / out.targets
    assert out.loss.item() == pytest.approx((mean[0] + 0.15 * (mean[1] + mean[2])).item(), rel=1e-9)


@pytest.mark.parametrize("width", [16, 7])  # torch draws 16 numbers together: 7 x 36 do not divide
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weights_start_as_the_numbers_of_one_draw_for_each_tensor(make_tiny_config, width, dtype):
    """Of a stack of experts they are drawn one expert at a time: half a layer of DeepSeek-V3 would
    be 30 GB in float32.
    """
    sizes = {"model.moe_intermediate_size": width, "model.hidden_size": 36}
    config = make_tiny_config(sizes | {"mtp.num_nextn_predict_layers": 2})
    model = DeepseekV3MTP(config.model, config.mtp).to(dtype)
    model.init_weights(5)
    generator = torch.Generator().manual_seed(5)
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if not isinstance(module, RMSNorm):
                whole = torch.empty(parameter.shape).normal_(0.0, 0.1, generator=generator)
                assert torch.equal(parameter, whole.to(dtype))


def test_a_start_holds_one_expert_in_float32(make_tiny_config):
    config = make_tiny_config({"model.hidden_size": 64, "model.n_routed_experts": 32})
    model = DeepseekV3MTP(config.model, config.mtp).bfloat16()
    with Meter() as meter:
        model.init_weights(0)
    largest = max(p.numel() for p in model.parameters() if p.ndim < 3)
    assert meter.peak < 4 * largest + 1000 < 4 * 32 * 2 * 16 * 64
