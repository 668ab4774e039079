"""Every objective on every kind of head against its formula on whole logits in float64; chunks,
memory, and what the loss counts.
"""

import json

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dsv3_mtp.model import objective_losses as losses
from dsv3_mtp.model.causal_lm import DeepseekV3MTP
from dsv3_mtp.model.objective_losses import Teacher, objective_losses
from dsv3_mtp.model.output import LossSettings
from dsv3_mtp.model.size import model_size
from dsv3_mtp.model.states import HeadRows, LMHead, Output, Scores
from dsv3_mtp.model.targets import valid_targets
from dsv3_mtp.objectives import registry
from dsv3_mtp.objectives.base import Objective, Slots
from tests.conftest import tiny
from tests.heads_under_test import KINDS

T, DEPTHS, LAMBDA = 16, 3, (0.3, 0.2, 0.1)


# Written down from the papers, on whole probabilities.
def overlap(p: Tensor, q: Tensor) -> Tensor:
    return torch.minimum(p, q).sum(-1)


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p / q).log()).sum(-1)


def hybrid(p: Tensor, q: Tensor) -> Tensor:
    w = torch.exp(-3 * overlap(p, q).detach())
    return w * kl(p, q) + (1 - w) * (1 - overlap(p, q))


FORMULAS = {
    "kl": kl,
    "tv": lambda p, q: (p - q).abs().sum(-1) / 2,
    "lk": lambda p, q: -overlap(p, q).log(),
    "lk_hybrid": hybrid,
}


class ExpectedLength(Objective):
    """A joint objective over depths: minus the expected number of accepted drafts, - sum_k prod_{j
    <= k} overlap_j, of which depth k's entry is one summand (e2e-TV, arXiv 2606.12370).
    """

    name = "expected_length"

    def counted(self, valid: Tensor) -> Tensor:
        return valid.cumprod(0).bool()  # depths 1..k all have a teacher

    def loss(self, slots: Slots) -> Tensor:
        return -slots.log_overlap.cumsum(0).exp()


def model_of(mode: str, objective: dict[str, float], **more) -> DeepseekV3MTP:
    keys = {"mtp.mode": mode, "mtp.num_nextn_predict_layers": DEPTHS, "mtp.objective": objective}
    config = tiny(keys | more)
    model = DeepseekV3MTP(config.model, config.mtp).double()
    model.init_weights(0)
    noise = torch.Generator().manual_seed(1)
    for parameter in model.mtp.parameters():  # at p = q, where some heads start, tv has a kink
        by = torch.randn(parameter.shape, generator=noise, dtype=parameter.dtype)
        parameter.data.add_(0.01 * by)
    return model


def inputs(lookahead: int, masked: bool = False) -> tuple[Tensor, Tensor | None, Tensor | None]:
    tokens = torch.randint(64, (3, T + lookahead))
    if not masked:
        return tokens, None, None
    documents = (torch.arange(tokens.shape[1]) // 7).expand_as(tokens)
    return tokens, documents, torch.rand(tokens.shape) < 0.6


def mean(values: Tensor, there: Tensor) -> Tensor:
    """0 where there is nothing: a depth without a slot adds nothing."""
    return (values * there).sum() / max(int(there.sum()), 1)


def by_formulas(model: DeepseekV3MTP, objective: dict[str, float], tokens, documents, scored):
    """Loss and {name/k: mean} from whole logits, with the gradient that `mtp.detach` leaves."""
    constant, output = model.mtp_config.detach == "all", model.head_rows(tokens, documents)
    logits = {}
    for rows in output.rows:
        weights = [
            x.detach() if constant and module is model.lm_head and 0 not in rows.depths else x
            for module in rows.outputs
            for x in module.weights()
        ]
        logits |= dict.fromkeys(rows.depths, rows.outputs[-1].logits(rows.inputs, weights))
    every = torch.stack([logits[k] for k in range(1 + DEPTHS)])
    valid = valid_targets(tokens, documents, model.offsets, scored)
    targets = torch.stack([tokens[:, ahead:][:, :T] for ahead in model.offsets])
    nll = -every.log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    means = {f"ce/{k}": mean(nll[k], valid[k]) for k in range(1 + DEPTHS)}
    p = logits[0].detach().softmax(-1)
    for name in objective.keys() - {"ce"}:
        for k in range(1, 1 + DEPTHS):
            ahead = model.offsets[k] - 1
            value = FORMULAS[name](p[:, ahead:], logits[k][:, : T - ahead].softmax(-1))
            means[f"{name}/{k}"] = mean(value, valid[k, :, : T - ahead])
    loss = means["ce/0"]
    taught = valid[1:].clone()
    overlap = torch.zeros(valid[1:].shape, dtype=every.dtype)
    for k in range(1, 1 + DEPTHS):
        ahead = model.offsets[k] - 1
        taught[k - 1, :, T - ahead :] = False
        q = logits[k][:, : T - ahead].detach().softmax(-1)
        overlap[k - 1, :, : T - ahead] = q.minimum(p[:, ahead:]).sum(-1)
    for name, weight in objective.items():
        counts = (valid[1:] if name == "ce" else taught).sum((1, 2)).double()
        shared = model.mtp.denominators(counts, torch.tensor(LAMBDA, dtype=torch.float64))
        for k in range(1, 1 + DEPTHS):
            share = LAMBDA[k - 1] * weight * counts[k - 1] / shared[k - 1].clamp(min=1e-9)
            loss = loss + share * means[f"{name}/{k}"]
    if model.loss.terms:  # that the heads own
        scores = Scores(nll.detach(), every.argmax(-1), targets, valid, taught, overlap)
        with model.lm_head.held(constant):
            found = model.mtp.loss_terms(output, scores)
        counts = model.mtp.count_terms(model.mtp_config, valid, taught)
        for (name, factor), count in zip(model.loss.terms.items(), counts, strict=True):
            loss = loss + factor * found[name] / count
    return loss, means


def test_the_formulas_are_of_every_objective_that_has_a_teacher():
    assert FORMULAS.keys() == {name for name, kind in registry().items() if kind.teacher}


ALL, PAIR = {"ce": 0.1} | {name: 0.7 for name in FORMULAS}, {"kl": 0.3, "tv": 1.8}


@pytest.mark.parametrize(
    ("head", "objective"),
    [*((head, ALL) for head in KINDS), ("sequential", PAIR), ("parallel_linear", PAIR)],
    ids=lambda value: value if isinstance(value, str) else "+".join(value),
)
def test_losses_and_gradients_equal_the_formulas_on_whole_logits(head, objective, monkeypatch):
    # two slots of all depths in a chunk: chunks begin and end within rows
    monkeypatch.setattr(losses, "CHUNK_ELEMENTS", 2 * DEPTHS * 64)
    for detach, masked in (("none", True), ("trunk", False), ("all", True)):
        mode = KINDS[head]["mtp.mode"]
        model = model_of(mode, objective, **{"mtp.detach": detach})
        batch = inputs(model.lookahead, masked)
        out = model(*batch, LossSettings(LAMBDA))
        out.loss.backward()
        got = {n: p.grad for n, p in model.named_parameters()}
        model.zero_grad()
        loss, means = by_formulas(model, objective, *batch)
        loss.backward()
        assert out.loss.item() == pytest.approx(loss.item(), rel=1e-12)
        for name, parameter in model.named_parameters():
            want = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            have = torch.zeros_like(parameter) if got[name] is None else got[name]
            torch.testing.assert_close(have, want, rtol=1e-9, atol=1e-12, msg=name)
        # the label's cross-entropy is reported whatever the objective is
        for k in range(1 + DEPTHS):
            found = out.nll_sum[k] / out.targets[k].clamp(min=1)
            assert found.item() == pytest.approx(means[f"ce/{k}"].item(), rel=1e-12)
        named = [f"{name}/{k}" for name in objective if name != "ce" for k in range(1, 1 + DEPTHS)]
        for name, total, count in zip(
            named,
            out.term_sum[len(model.loss.terms) :],
            out.term_count[len(model.loss.terms) :],
            strict=True,
        ):
            assert (total / count.clamp(min=1)).item() == pytest.approx(
                means[name].item(), rel=1e-12
            )


def test_cross_entropy_in_its_general_form_is_the_hand_written_one(monkeypatch):
    monkeypatch.setattr(losses, "CHUNK_ELEMENTS", 500)
    ce = registry()["ce"]
    general = type("General", (ce,), {"name": "general", "cross_entropy": False})
    results = []
    for kind in (ce, general):
        model = model_of("sequential", {"ce": 1.0})
        model.loss.label_weight = float(kind is ce)
        model.loss.objectives = [] if kind is ce else [(kind(), 1.0)]
        model.loss.compared = model.loss.objectives
        torch.manual_seed(0)
        out = model(*inputs(1 + DEPTHS, masked=True), LossSettings(LAMBDA))
        results.append([out.loss, *torch.autograd.grad(out.loss, list(model.parameters()))])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)


def tables(depths: int, slots: int, vocab: int, dtype=torch.float64):
    """Heads with a bias of their own behind the shared head, and a teacher: (students, teacher)."""

    class Biased(Output):
        def __init__(self):
            super().__init__()
            self.bias = nn.Parameter(torch.randn(vocab, dtype=dtype))

        def logits(self, inputs, weights):
            return F.linear(inputs[0], weights[0]) + weights[1]

    head = LMHead(8, vocab, bias=False, dtype=dtype)
    states = torch.randn(2, slots // 2, 8, dtype=dtype)
    rows = [
        HeadRows((torch.randn_like(states, requires_grad=True),), (k,), (head, Biased()))
        for k in range(1, 1 + depths)
    ]
    return rows, Teacher(head, states, tuple(range(1, 1 + depths)))


def arguments_of(kinds, rows, teacher):
    depths, shape = len(rows), teacher.states.shape[:2]
    targets = torch.randint(teacher.head.out_features, (depths, *shape))
    valid = torch.ones(depths, *shape, dtype=torch.bool)
    for k in range(depths):
        valid[k, :, shape[1] - 1 - k :] = False
    weight = torch.stack([kind.counted(valid) for kind in kinds]).to(teacher.states)
    return rows, teacher, targets, weight


def run(kinds, rows, teacher):
    return objective_losses(kinds, *arguments_of(kinds, rows, teacher))


def test_a_joint_objective_sees_all_depths_of_a_slot(monkeypatch):
    """-sum_k prod_{j<=k} overlap_j against whole probabilities, over chunks."""
    rows, teacher = tables(3, 10, 5)
    monkeypatch.setattr(losses, "CHUNK_ELEMENTS", 3 * 5 * 3)
    loss, _ = run([ExpectedLength()], rows, teacher)
    leaves = [one.inputs[0] for one in rows] + [*teacher.head.parameters()]
    leaves += [one.outputs[1].bias for one in rows]
    got = torch.autograd.grad(loss, leaves)
    p = (teacher.states @ teacher.head.weight.T).detach().softmax(-1)
    want = 0.0
    for i in range(5):
        joint = 1.0
        for k in range(1, 4):
            if i + k < 5:
                logits = rows[k - 1].inputs[0][:, i] @ teacher.head.weight.T
                q = (logits + rows[k - 1].outputs[1].bias).softmax(-1)
                joint = joint * overlap(p[:, i + k], q)
                want = want - joint.sum()
    assert loss.item() == pytest.approx(want.item(), rel=1e-12)
    for a, b in zip(got, torch.autograd.grad(want, leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_the_gradients_are_there_once():
    rows, teacher = tables(1, 8, 5)
    loss, _ = run([registry()["kl"]()], rows, teacher)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="used up by the first backward"):
        loss.backward()


def peak_bytes(function, folder) -> int:
    """The most that the CPU's allocator held at a time beyond what it held before, intermediate
    results within an operation included.
    """
    with torch.profiler.profile(profile_memory=True) as profile:
        function()
    profile.export_chrome_trace(str(folder / "trace.json"))
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    sizes = [
        e["args"]["Bytes"]
        for e in sorted((e for e in events if e["name"] == "[memory]"), key=lambda e: e["ts"])
    ]
    held = peak = 0
    for size in sizes:
        held += size
        peak = max(peak, held)
    return peak


@pytest.mark.parametrize("names", [["kl"], [*FORMULAS]], ids=["kl", "all together"])
def test_memory_is_at_most_eight_chunks_whatever_the_slots_and_depths(names, monkeypatch, tmp_path):
    chunk, vocab = 2**17, 1000
    monkeypatch.setattr(losses, "CHUNK_ELEMENTS", chunk)
    kinds, peaks = [registry()[name]() for name in names], {}
    for depths, slots in ((1, 600), (1, 2400), (4, 600)):
        arguments = arguments_of(kinds, *tables(depths, slots, vocab, torch.float32))
        peak = peak_bytes(lambda given=arguments: objective_losses(kinds, *given), tmp_path)
        # what is returned, or kept for the backward: of a slot and depth 8 numbers of the gradient,
        # and its weight and value for each objective, in three places
        peaks[depths, slots] = (peak - depths * slots * 4 * (8 + 4 * len(kinds))) / (4 * chunk)
    assert min(peaks.values()) > 2 and max(peaks.values()) <= 8, peaks
    print(names, peaks)
    assert max(peaks.values()) - min(peaks.values()) < 2, peaks


@pytest.mark.parametrize(
    "objective", [{"kl": 1.0}, {"ce": 0.5, "kl": 1.0, "tv": 1.0}], ids="+".join
)
@pytest.mark.parametrize("head", [h for h in KINDS if h in ("sequential", "parallel_linear")])
def test_planned_flops_are_counted_ones(head, objective):
    """By torch's counter: what an objective costs beyond the label's cross-entropy."""

    def product(_total, a, b, **_rest) -> int:
        return 2 * a[0] * a[1] * b[1]

    in_place = {torch.ops.aten.addmm_: product}  # it knows addmm alone
    measured, planned = [], []
    for kinds in ({"ce": 1.0}, objective):
        model = model_of(head, kinds, **{"model.vocab_size": 512})
        tokens = torch.randint(512, (8, T + model.lookahead))
        with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
            model(tokens).loss.backward()
        measured.append(counter.get_total_flops())
        planned.append(model_size(model, T).flops_per_token * tokens.shape[0] * T)
    want = planned[1] - planned[0]
    assert measured[1] - measured[0] == pytest.approx(want, rel=0.02)
