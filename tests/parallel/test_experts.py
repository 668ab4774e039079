"""The experts of a rank, in a group of one: what the layouts' tests do not see."""

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from dsv3_mtp.model.moe import MoE, count
from dsv3_mtp.ops.compute import Compute, building
from dsv3_mtp.parallel import private
from dsv3_mtp.parallel.experts import _rows_of, local_experts

WAITS = {"aten.nonzero.default", "aten.bincount.default", "aten._local_scalar_dense.default"}


class Waits(TorchDispatchMode):
    """The operations for which the host would wait for a GPU, inside."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if str(function) in WAITS:
            self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


def test_rows_of_what_is_wanted():
    wanted = torch.tensor([[1, 0], [1, 1], [0, 1], [0, 1]])
    token, slots = _rows_of(wanted, 5)
    assert token.tolist() == [0, 1, 1, 2, 3]
    assert slots.tolist() == [[0, -1], [1, 2], [-1, 3], [-1, 4]]


def test_a_group_of_one_computes_what_all_experts_do_and_asks_the_host_for_sizes_only(
    make_tiny_config, monkeypatch
):
    """`tolist` of the sizes is the one wait: of the operations that wait by themselves there is
    none.
    """
    monkeypatch.setattr(dist, "all_to_all_single", lambda out, x, *rest, group: out.copy_(x))
    monkeypatch.setattr(private, "make_expert_groups", lambda size, stages: None)
    monkeypatch.setattr(private, "expert_group", lambda name: (None, 0))
    config = make_tiny_config().model
    whole = MoE(config)
    for parameter in whole.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    with building(Compute(experts=local_experts(1))):
        parted = MoE(config)
    parted.load_state_dict(whole.state_dict())
    x = torch.randn(1, 23, config.hidden_size)
    results = []
    for moe in (whole, parted):
        a = x.clone().requires_grad_()
        chosen, gates, _ = moe.gate(a)
        counts = count(chosen, config.n_routed_experts)
        with Waits() as waits:
            y = moe.experts(a.flatten(0, 1), chosen, gates, counts)
            y.sum().backward()
        assert waits.seen == []
        results.append([y, a.grad, *(p.grad for p in moe.parameters() if p.grad is not None)])
    for plain, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain)
