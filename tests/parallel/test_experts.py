"""The experts of a rank, in a group of one: what the layouts' tests do not see."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from dsv3_mtp.config import ModelConfig
from dsv3_mtp.model.moe import MoE
from dsv3_mtp.ops.compute import Compute, building
from dsv3_mtp.parallel import private
from dsv3_mtp.parallel.experts import _rows_of, local_experts
from tests.waits import Waits


def test_rows_of_what_is_wanted():
    wanted = torch.tensor([[1, 0], [1, 1], [0, 1], [0, 1]])
    token, slots = _rows_of(wanted, 5)
    assert token.tolist() == [0, 1, 1, 2, 3]
    assert slots.tolist() == [[0, -1], [1, 2], [-1, 3], [-1, 4]]


class Work:
    """An all-to-all of one rank, which has happened only when somebody has waited for it."""

    def __init__(self, log, out, x):
        self.log, self.out, self.x = log, out, x
        out.fill_(-1)  # what nobody may read yet
        log.append("start")

    def wait(self):
        self.out.copy_(self.x)
        self.log.append("wait")


@pytest.fixture
def alone(monkeypatch):
    """A group of one rank; the order in which its all-to-alls start and are waited for."""
    log: list[str] = []

    def all_to_all(out, x, *sizes, group, async_op=False):
        if not async_op:
            return out.copy_(x)
        return Work(log, out, x)

    monkeypatch.setattr(dist, "all_to_all_single", all_to_all)
    monkeypatch.setattr(private, "make_expert_groups", lambda size, stages: None)
    monkeypatch.setattr(private, "expert_group", lambda name: (None, 0))
    return log


def both(config: ModelConfig) -> tuple[MoE, MoE]:
    """A layer with all experts, and one with its group's: the same weights."""
    whole = MoE(config)
    for parameter in whole.parameters():
        nn.init.normal_(parameter, std=0.3)
    with building(Compute(experts=local_experts(1))):
        parted = MoE(config)
    parted.load_state_dict(whole.state_dict())
    return whole, parted


def test_a_group_of_one_computes_what_all_experts_do(make_tiny_config, alone):
    config = make_tiny_config().model
    x, results = torch.randn(1, 23, config.hidden_size), []
    for moe in both(config):
        a = x.clone().requires_grad_()
        y, stats = moe(a)
        (y.square().sum() + stats.balance).backward()
        results.append([y, a.grad, *(p.grad for p in moe.parameters())])
    for plain, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain)


def test_the_host_waits_once_in_a_layer_and_for_its_sizes(make_tiny_config, monkeypatch, alone):
    """Of a CPU's paths those of a GPU are taken: one kernel for all experts, rows not padded."""
    monkeypatch.setattr("dsv3_mtp.ops.experts.grouped_kernel", lambda *tensors: True)
    monkeypatch.setattr("dsv3_mtp.ops.experts.padding", lambda x: 1)
    config = make_tiny_config().model
    for moe, expected in zip(both(config), ([], ["tolist"]), strict=True):
        x = torch.randn(1, 23, config.hidden_size, requires_grad=True)
        with Waits() as waits:
            y, stats = moe(x)
            (y.square().sum() + stats.balance).backward()
        assert waits.seen == expected
    with Waits() as waits:  # it sees what it has to see
        x = torch.ones(3)
        bool(x[0]), x.nonzero(), x[x > 0], x.tolist(), x.cpu()
    assert [name.partition(".")[0] for name in waits.seen] == [
        "_local_scalar_dense",
        "nonzero",
        "index",
        "tolist",
        "cpu",
    ]


def test_shared_experts_are_computed_while_tokens_travel(make_tiny_config, alone):
    _, moe = both(make_tiny_config().model)
    moe.shared_experts.register_forward_hook(lambda *_: alone.append("shared"))
    moe.shared_experts.up_proj.weight.register_hook(lambda _: alone.append("grad of shared"))
    x = torch.randn(1, 23, moe.gate.weight.shape[1], requires_grad=True)
    y, _ = moe(x)
    # numbers, gates, tokens; the sums back
    assert alone == [*["start", "wait"] * 2, "start", "shared", "wait", "start", "wait"]
    alone.clear()
    y.sum().backward()
    assert alone == ["start", "wait", "start", "grad of shared", "wait", "start", "wait"]
