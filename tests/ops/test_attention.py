"""The attention core against the formula in float64, with and without documents."""

from itertools import pairwise

import pytest
import torch
from torch.nn.attention import SDPBackend
from torch.utils._python_dispatch import TorchDispatchMode

from dsv3_mtp.model.targets import document_starts
from dsv3_mtp.ops import attention, choice, cores
from dsv3_mtp.ops.attention import attend, sdpa
from dsv3_mtp.ops.cores import FlashCore
from dsv3_mtp.ops.rotary import to_heads

ROWS = [[0, 0, 0, 1, 1, 1, 1], [5, 6, 7, 7, 7, 9, 9]]


def formula(q, k, v, scale, documents):
    """softmax(q k^T scale) v with the whole (T, T) mask."""
    length = q.shape[2]
    allowed = torch.ones(length, length).tril().bool()
    if documents is not None:
        allowed = (allowed & (documents[:, :, None] == documents[:, None, :])).unsqueeze(1)
    return (q @ k.mT * scale).masked_fill(~allowed, float("-inf")).softmax(-1) @ v


def test_a_document_starts_where_its_number_is_first_seen():
    starts = document_starts(torch.tensor(ROWS))
    assert starts.tolist() == [[0, 0, 0, 3, 3, 3, 3], [0, 1, 2, 2, 2, 5, 5]]


@pytest.mark.parametrize("block", [2, 3, 512])
@pytest.mark.parametrize("documents", [None, ROWS])
def test_the_core_and_its_gradients_equal_the_formula_in_float64(monkeypatch, documents, block):
    monkeypatch.setattr(attention, "BLOCK", block)
    numbers = None if documents is None else torch.tensor(documents)
    starts = None if numbers is None else document_starts(numbers)
    leaves = [torch.randn(2, 3, 7, n, dtype=torch.float64) for n in (12, 12, 8)]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    got, want = sdpa(*leaves, 0.3, starts), formula(*leaves, 0.3, numbers)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    cotangent = torch.randn_like(want)
    grads = [torch.autograd.grad(y, leaves, cotangent) for y in (got, want)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("length", [5, 70, 200])
def test_documents_in_c_are_those_of_the_formula(compiled, length):
    """And of torch's operations, which `plain` asks for."""
    numbers = torch.stack([torch.arange(length) // 33, torch.arange(length) // 7])
    starts, angles = document_starts(numbers), torch.randn(2, length, 2)
    leaves = [torch.randn(2, length, *s) for s in ((3, 12), (3, 14), (4,))]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    mixed = formula(*to_heads(*exact, angles.double()), 0.3, numbers).transpose(1, 2).flatten(2)
    cotangent = torch.randn_like(mixed)
    wanted = [mixed, *torch.autograd.grad(mixed, exact, cotangent)]
    results = [attend(*leaves, angles, 0.3, starts)]
    with choice.plain():
        results.append(attend(*leaves, angles, 0.3, starts))
    assert not torch.equal(*results)  # C and torch: two implementations
    for y in results:
        found = [y, *torch.autograd.grad(y, leaves, cotangent.float())]
        for ours, want in zip(found, wanted, strict=True):
            assert (ours.double() - want).norm() <= 2e-6 * want.norm()


def test_a_start_outside_the_row_leaves_a_slot_at_least_itself(compiled):
    query, kv, k_rope = (torch.randn(1, 9, *s) for s in ((2, 6), (2, 7), (2,)))
    angles, starts = torch.zeros(2, 9, 1), torch.full((1, 9), 10**6)
    angles[0] = 1.0
    alone = attend(query, kv, k_rope, angles, 0.3, starts)
    torch.testing.assert_close(alone, kv[..., 4:].flatten(2))


class Largest(TorchDispatchMode):
    """The most numbers that any tensor had, inside."""

    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        tensors = out if isinstance(out, tuple | list) else (out,)
        sizes = [x.numel() for x in tensors if isinstance(x, torch.Tensor)]
        self.numbers = max([self.numbers, *sizes])
        return out


def test_documents_never_make_a_square_of_the_row():
    length = 4096
    leaves = [torch.randn(1, 1, length, n, requires_grad=True) for n in (8, 8, 4)]
    starts = (torch.arange(length) // 3000 * 3000)[None]
    with Largest() as largest:
        sdpa(*leaves, 0.3, starts).sum().backward()
    assert largest.numbers <= attention.BLOCK * length


def test_documents_are_the_sequences_of_flash_attentions_varlen_call():
    """The adapter, around functions that compute the formula in the shapes of flash-attn."""
    calls = []

    def whole(q, k, v, softmax_scale, causal):
        parts = [x.transpose(1, 2) for x in (q, k, v)]
        return formula(*parts, softmax_scale, None).transpose(1, 2), "log-sum-exp"

    def varlen(q, k, v, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **options):
        ends = cu_seqlens_q.tolist()
        assert cu_seqlens_q.dtype == torch.int32 and cu_seqlens_k is cu_seqlens_q
        assert max_seqlen_q == max_seqlen_k == max(b - a for a, b in pairwise(ends))
        calls.append(ends)
        parts = [[x[a:b][None] for x in (q, k, v)] for a, b in pairwise(ends)]
        return torch.cat([whole(*part, **options)[0][0] for part in parts])

    core = FlashCore(whole, varlen, pad_value=False)
    q, k, v = (torch.randn(2, 3, 7, n, dtype=torch.float64) for n in (12, 12, 8))
    numbers = torch.tensor(ROWS)
    starts = document_starts(numbers)
    torch.testing.assert_close(core(q, k, v, 0.3, starts), formula(q, k, v, 0.3, numbers))
    torch.testing.assert_close(core(q, k, v, 0.3, None), formula(q, k, v, 0.3, None))
    assert calls == [[0, 3, 7, 8, 9, 12, 14]]


@pytest.mark.parametrize(
    ("capability", "first"), [((9, 0), "fa4"), ((10, 0), "fa4"), ((10, 3), "fa4"), ((8, 9), "fa2")]
)
def test_auto_tries_the_kernels_that_were_made_for_the_gpu(monkeypatch, capability, first):
    tried = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(cores, "_try", lambda name, *rest: (tried.append(name), (sdpa, ""))[1])
    device = torch.device("cuda")
    shape = {"heads": 2, "widths": (192, 128), "dtype": torch.bfloat16, "masked": True}
    cores.choose_attention("auto", device=device, **shape)
    assert tried == [first]


def test_cudnn_never_runs_under_documents():
    """Its backward gives nan where T % 128 == 64 (pytorch#196678)."""
    assert SDPBackend.CUDNN_ATTENTION not in attention.MASKED
    assert SDPBackend.CUDNN_ATTENTION in attention.CAUSAL
