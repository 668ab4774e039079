"""The C kernels against torch's operations in float64, and what happens where they cannot be
built.
"""

import shutil
import subprocess
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from dsv3_mtp.model.attention import MLA
from dsv3_mtp.model.causal_lm import DeepseekV3MTP
from dsv3_mtp.model.layers import MLP, RMSNorm, rotary_angles
from dsv3_mtp.model.output import LossSettings
from dsv3_mtp.ops import c, c_library, choice
from dsv3_mtp.ops.attention import attend
from dsv3_mtp.ops.cross_entropy import linear_cross_entropy
from dsv3_mtp.ops.experts import routed
from dsv3_mtp.ops.rotary import rotate
from dsv3_mtp.train.optim import build_optimizer
from tests.ranks import run_ranks

TOLERANCE = {
    torch.float32: 2e-6,
    torch.bfloat16: 1.2e-2,
}  # of norms; bfloat16: a few roundings by 2^-9 each
DTYPES = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)


def in_float64_and_in_kernels(module, x, call, low=torch.float32):
    """(output, gradient of x, gradients of the parameters) of both, for the same random
    cotangent.
    """
    module, x, results = module.to(low), x.detach().to(low), []
    for dtype in (torch.float64, low):
        copy = module.to(dtype)
        inputs = x.to(dtype).requires_grad_()
        y = call(copy, inputs)
        cotangent = torch.randn(
            y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64
        )
        cotangent = cotangent.to(low).to(dtype)
        results.append([y, *torch.autograd.grad(y, [inputs, *copy.parameters()], cotangent)])
    return results


def assert_close(results, dtype=torch.float32):
    for expected, got in zip(*results, strict=True):
        assert got.dtype == dtype
        assert (got.double() - expected).norm() <= TOLERANCE[dtype] * expected.norm() + 1e-12


@DTYPES
@pytest.mark.parametrize("shape", [(2, 3, 16), (40, 37), (1, 1, 5)])
def test_rmsnorm(compiled, shape, dtype):
    norm = RMSNorm(shape[-1], 1e-6)
    norm.weight.data = torch.rand(shape[-1])
    assert_close(
        in_float64_and_in_kernels(norm, torch.randn(shape), lambda module, x: module(x), dtype),
        dtype,
    )


def test_numbers_become_bfloat16_as_torch_rounds_them(compiled):
    halves = torch.tensor(
        [1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 3.3e38, 1e-39, torch.inf, -torch.inf, torch.nan]
    )
    x = torch.cat([halves, torch.randn(1000) * 2.0 ** torch.randint(-40, 40, (1000,))])
    # silu(60) is 60: one product, then rounded
    got = c.swiglu(torch.full_like(x, 60)[None].bfloat16(), x[None].bfloat16(), None)[0]
    torch.testing.assert_close(
        got, (x.bfloat16().float() * 60).bfloat16(), rtol=0, atol=0, equal_nan=True
    )


def test_rmsnorm_of_a_part_of_a_wider_row(compiled):
    norm = RMSNorm(10, 1e-6)
    assert_close(
        in_float64_and_in_kernels(
            norm, torch.randn(2, 5, 14), lambda module, x: module(x[..., :10])
        )
    )
    assert_close(
        in_float64_and_in_kernels(
            norm, torch.randn(2, 5, 20), lambda module, x: module(x[..., ::2])
        )
    )


@DTYPES
def test_swiglu_feed_forward(compiled, dtype):
    mlp = MLP(12, 20)
    x = 4 * torch.randn(2, 7, 12)
    assert_close(in_float64_and_in_kernels(mlp, x, lambda module, x: module(x), dtype), dtype)


def test_large_and_small_inputs_of_swiglu_neither_overflow_nor_vanish(compiled):
    gate = torch.tensor([-200.0, -90.0, -1e-3, 0.0, 1e-3, 90.0, 200.0])
    torch.testing.assert_close(
        c.swiglu(gate[None], torch.ones(1, 7), None)[0], F.silu(gate), rtol=1e-5, atol=1e-30
    )


@DTYPES
@pytest.mark.parametrize("length", [1, 7, 128, 150, 300])
def test_attention_of_any_length_with_gradients(compiled, make_tiny_config, length, dtype):
    config = make_tiny_config({"model.max_position_embeddings": 300}).model
    mla = MLA(config)
    angles = rotary_angles(config, torch.arange(length))
    x = torch.randn(2, length, config.hidden_size)

    def attend(module, x):
        return module(x, angles.double() if x.dtype == torch.float64 else angles, None)

    assert_close(in_float64_and_in_kernels(mla, x, attend, dtype), dtype)


@pytest.mark.parametrize("widths", [(4, 2, 3), (20, 4, 17), (33, 14, 50)])
def test_attention_of_any_widths_is_that_of_torch(compiled, widths):
    nope, rope, value = widths
    query, kv, k_rope = (
        torch.randn(2, 70, *s) for s in ((3, nope + rope), (3, nope + value), (rope,))
    )
    leaves, angles = (
        [x.requires_grad_() for x in (query, kv, k_rope)],
        torch.randn(2, 70, rope // 2),
    )
    got = attend(*leaves, angles, 0.3)
    turned = rotate(k_rope.unsqueeze(2), angles).expand(-1, -1, 3, -1)
    q = torch.cat([query[..., :nope], rotate(query[..., nope:], angles)], -1).transpose(1, 2)
    k = torch.cat([kv[..., :nope], turned], -1).transpose(1, 2)
    want = F.scaled_dot_product_attention(
        q, k, kv[..., nope:].transpose(1, 2), is_causal=True, scale=0.3
    )
    want = want.transpose(1, 2).flatten(2)
    cotangent = torch.randn_like(want)
    results = [[y, *torch.autograd.grad(y, leaves, cotangent)] for y in (want, got)]
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=2e-5)


def test_inputs_with_gaps_between_their_numbers_are_read_where_they_are(compiled):
    query, kv, k_rope = torch.randn(2, 9, 3, 12), torch.randn(2, 9, 3, 14), torch.randn(2, 11, 4)
    angles, leaves = (
        torch.randn(2, 9, 2),
        [torch.randn(300, 64), *experts_and_rows(torch.float32)[0][1:]],
    )
    _, chosen, counts = experts_and_rows(torch.float32)
    hidden, weight, targets, row_weight = (
        torch.randn(8, 5),
        torch.randn(7, 5),
        torch.randint(7, (16,)),
        torch.rand(1),
    )
    for make in (
        lambda copy: attend(query, kv, copy(k_rope[:, :9]), angles, 0.3),
        lambda copy: attend(
            query, kv, copy(k_rope[:, 2:, ::2].expand(2, 9, 2)), angles[..., :1], 0.3
        ),
        lambda copy: routed(copy(leaves[0][::2]), *leaves[1:], chosen, counts),
        lambda copy: linear_cross_entropy(
            hidden, weight, copy(targets[::2]), copy(row_weight.expand(8))
        )[0],
    ):
        assert torch.equal(make(lambda x: x), make(torch.Tensor.contiguous))


def experts_and_rows(dtype, tokens=150, experts=5, width=64, hidden=32):
    """Leaves and choice of `routed`; the last expert gets no token."""
    leaves = [torch.randn(tokens, width), torch.rand(tokens, 2)]
    leaves += [torch.randn(experts, 2 * hidden, width) / 8, torch.randn(experts, width, hidden) / 8]
    leaves = [
        leaf.to(torch.float32 if leaf is leaves[1] else dtype).requires_grad_() for leaf in leaves
    ]
    chosen = torch.stack([torch.randperm(experts - 1)[:2] for _ in range(tokens)])
    return leaves, chosen, torch.bincount(chosen.flatten(), minlength=experts)


@DTYPES
def test_routed_experts_with_gradients(compiled, dtype):
    leaves, chosen, counts = experts_and_rows(dtype)
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    cotangent = torch.randn(150, 64).to(dtype)
    results = []
    for inputs in (wide, leaves):
        y = routed(*inputs, chosen, counts)
        results.append([y, *torch.autograd.grad(y, inputs, cotangent.to(y.dtype))])
    for expected, got in zip(*results, strict=True):
        assert (got.double() - expected).norm() <= TOLERANCE[dtype] * expected.norm()
    # of the expert without tokens
    assert all(weights[-1].count_nonzero() == 0 for weights in results[1][3:])


def test_what_c_would_read_beyond_its_tensors_is_refused(compiled):
    """C follows raw pointers: sizes, types and indices are checked before, in one sentence."""
    x, index = torch.randn(8, 16), torch.zeros(3, 2, dtype=torch.int64)
    for outside in (100, 8, -2):
        index[2, 1] = outside
        with pytest.raises(IndexError, match=r"index: 1 numbers are outside -1 .. 7"):
            c.sum_rows(x, index)
    norm, half, wide = torch.ones(16), x.bfloat16(), torch.randn(8, 32)
    heads = torch.randn(1, 5, 2, 6), torch.randn(1, 5, 2, 7), torch.randn(1, 5, 2)
    angles, targets = torch.randn(2, 5, 1), torch.zeros(8, dtype=torch.int64)
    for call, name in (
        (lambda: c.sum_rows(x, index.int()), "index"),
        (lambda: c.sum_rows(x.t(), index), "x"),
        (lambda: c.rms_norm(x, norm[:8], 1e-6), "weight"),
        (lambda: c.rms_norm(x, norm.bfloat16(), 1e-6), "weight"),
        (lambda: c.rms_norm(x[:, ::2], norm[:8], 1e-6), "x"),
        (lambda: c.swiglu(x, wide, None), "up"),
        (lambda: c.swiglu(x, half, None), "up"),
        (lambda: c.swiglu(x, x, norm), "factor"),
        (lambda: c.swiglu_backward(wide, x, x, None), "grad"),
        (lambda: c.attention(heads[0][:, :4], *heads[1:], angles, None, 0.3), "k"),
        (lambda: c.attention(*heads, angles[..., :0], None, 0.3), "angles"),
        (lambda: c.attention(*heads, angles, index, 0.3), "first"),
        (lambda: c.cross_entropy_(x, targets[:7], norm[:8]), "targets"),
        (lambda: c.cross_entropy_(x, targets, norm), "row_weight"),
    ):
        with pytest.raises(ValueError, match=rf"^{name}\w*: "):
            call()


def test_routed_experts_leave_out_the_gradients_of_frozen_weights(compiled):
    leaves, chosen, counts = experts_and_rows(torch.float32)
    whole = torch.autograd.grad(routed(*leaves, chosen, counts).sum(), leaves[:2])
    frozen = [*leaves[:2], *(leaf.detach() for leaf in leaves[2:])]
    part = torch.autograd.grad(routed(*frozen, chosen, counts).sum(), leaves[:2])
    assert all(map(torch.equal, whole, part))


@DTYPES
def test_cross_entropy(compiled, dtype):
    hidden, targets, row_weight = torch.randn(37, 8), torch.randint(19, (37,)), torch.rand(37)
    head = torch.nn.Linear(8, 19, bias=False)
    extra = []

    def loss(module, x):
        value, *rest = linear_cross_entropy(x, module.weight, targets, row_weight)
        extra.append(rest)
        return value

    results = in_float64_and_in_kernels(head, hidden, loss, dtype)
    assert_close(
        [[y.to(dtype) if y.ndim == 0 and i else y for y in r] for i, r in enumerate(results)], dtype
    )
    (nll, prediction), (own_nll, own_prediction) = extra
    low = dtype == torch.bfloat16
    torch.testing.assert_close(
        own_nll.double(), nll, rtol=1e-2 if low else 1e-6, atol=1e-2 if low else 1e-6
    )
    # rounded logits are equal more often
    assert (own_prediction == prediction).float().mean() >= (0.9 if low else 1)


@DTYPES
def test_cross_entropy_of_equal_logits_predicts_the_first_and_nan_stays_nan(compiled, dtype):
    logits = torch.zeros(2, 9, dtype=dtype)
    logits[1, 4] = torch.nan
    nll, prediction = c.cross_entropy_(logits, torch.tensor([3, 3]), torch.ones(2))
    assert c.cross_entropy_(torch.zeros(1, 9), torch.tensor([9]), torch.ones(1))[
        0
    ].isnan()  # no such token
    assert prediction[0] == 0 and 0 <= prediction[1] < 9
    assert nll[0].item() == pytest.approx(2.1972246) and nll[1].isnan()
    assert logits[1].isnan().any()


@DTYPES
@pytest.mark.parametrize("width", [5, 16, 40, 1000])
def test_cross_entropy_of_ties_predicts_the_first_and_its_loss_is_exact(compiled, width, dtype):
    """e^x of the bfloat16 kernels is not exact to float32's last place, but far beyond
    bfloat16's.
    """
    logits = torch.randint(-4, 3, (50, width)).to(dtype)
    targets, wide = torch.randint(width, (50,)), logits.double()
    nll, prediction = c.cross_entropy_(logits, targets, torch.ones(50))
    assert torch.equal(prediction, (wide == wide.amax(1, keepdim=True)).int().argmax(1))
    atol = 1e-6 if dtype == torch.float32 else 1e-5
    torch.testing.assert_close(
        nll.double(), F.cross_entropy(wide, targets, reduction="none"), rtol=1e-6, atol=atol
    )


@pytest.mark.parametrize("mode", ["sequential", "parallel"])
def test_the_whole_model_gives_the_loss_and_gradients_of_the_plain_one(
    compiled, make_tiny_config, mode
):
    config = make_tiny_config({"mtp.mode": mode, "mtp.num_nextn_predict_layers": 2})
    model = DeepseekV3MTP(config.model, config.mtp)
    model.init_weights(0)
    tokens = torch.randint(64, (3, 16 + 3))
    results = []
    for scope in (nullcontext(), choice.plain()):
        with scope:
            out = model(tokens, settings=LossSettings(balance_loss_weight=0.01))
        results.append([out.loss, *torch.autograd.grad(out.loss, list(model.parameters()))])
    for got, expected in zip(*results, strict=True):
        assert (got - expected).norm() <= 2e-5 * expected.norm()


def test_the_first_steps_in_bfloat16_are_as_near_to_float64_as_with_torchs_operations(
    compiled, make_tiny_config
):
    """Five steps of AdamW from the same weights, without float32 masters: 1 % off with and without
    kernels.
    """
    config = make_tiny_config(
        {"model.hidden_size": 32, "model.moe_intermediate_size": 32, "train.dtype": "bfloat16"}
    )
    tokens, losses = torch.randint(64, (4, 16 + 1 + config.mtp.depths)), {}
    for name, dtype in (
        ("kernels", torch.bfloat16),
        ("operations", torch.bfloat16),
        ("exact", torch.float64),
    ):
        model = DeepseekV3MTP(config.model, config.mtp)
        model.init_weights(0)
        for parameter in model.parameters():
            parameter.data = parameter.data.bfloat16().to(dtype)
        optimizer = build_optimizer(model, config.optim)
        losses[name] = []
        for _ in range(5):
            optimizer.zero_grad()
            with nullcontext() if name == "kernels" else choice.plain():
                loss = model(tokens).loss
            loss.backward()
            optimizer.step()
            losses[name].append(loss.item())
    errors = {
        name: [abs(a / b - 1) for a, b in zip(losses[name], losses["exact"], strict=True)]
        for name in losses
    }
    assert sum(errors["kernels"]) < 1.5 * sum(errors["operations"]), errors
    assert losses["kernels"][-1] < losses["kernels"][0]


def in_a_process(function, *args, log: Path) -> None:
    """Where torch may start threads: a process with threads must not fork the ranks of later tests,
    whose first parallel loop would wait for threads that the fork left behind.
    """
    codes = run_ranks(function, *args, log=log)
    assert codes == [0], Path(f"{log}.rank0").read_text()


@DTYPES
def test_attention_and_experts_give_the_same_bits_for_any_number_of_threads(
    compiled, dtype, tmp_path
):
    in_a_process(attention_and_experts_by_threads, dtype, log=tmp_path / "log")


def attention_and_experts_by_threads(dtype):
    leaves, chosen, counts = experts_and_rows(dtype)
    query, kv, k_rope = (
        torch.randn(2, 70, *s).to(dtype).requires_grad_() for s in ((3, 12), (3, 14), (4,))
    )
    angles, results = torch.randn(2, 70, 2), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        mixed, y = attend(query, kv, k_rope, angles, 0.3), routed(*leaves, chosen, counts)
        grads = torch.autograd.grad([mixed.sum(), y.sum()], [query, kv, k_rope, *leaves])
        results.append([mixed, y, *grads])
    assert all(map(torch.equal, *results))


def test_any_number_of_threads_gives_the_same_bits(compiled, tmp_path):
    in_a_process(norms_by_threads, log=tmp_path / "log")


def norms_by_threads():
    x, weight = torch.randn(1000, 33), torch.rand(33)
    _, scale = c.rms_norm(x, weight, 1e-6)
    one = c.rms_norm_backward(x, x, weight, scale)
    torch.set_num_threads(2)
    assert all(map(torch.equal, one, c.rms_norm_backward(x, x, weight, scale)))


@pytest.fixture
def anew(monkeypatch):
    """Libraries are looked for again, and those of the test are forgotten after it."""
    c_library._library.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    c_library._library.cache_clear()


def test_without_a_compiler_the_model_runs_on_torchs_operations_and_says_so(anew):
    anew.setenv("CC", "no-such-compiler")
    assert choice.describe(torch.device("cpu")) == (
        "C kernels: not built, torch's operations run instead "
        "(there is no C compiler; install one, or name it in CC)"
    )
    assert choice.kernels(torch.zeros(1)) is None
    assert RMSNorm(4, 1e-6)(torch.ones(2, 4)).tolist() == [[pytest.approx(1.0)] * 4] * 2


@pytest.mark.skipif(shutil.which("clang") is None, reason="clang is not installed")
@pytest.mark.parametrize("flags", c_library.TYPES.values(), ids=str)
def test_clang_takes_the_sources_too(flags, tmp_path):
    for source in (Path(c.__file__).parent / "csrc").glob("*.c"):
        command = [
            "clang",
            "-c",
            "-march=native",
            *flags,
            str(source),
            "-o",
            str(tmp_path / "object"),
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_a_failed_build_leaves_nothing_behind(anew, tmp_path):
    failing = tmp_path / "cc"
    failing.write_text("#!/bin/sh\necho 'no space left' >&2; exit 1\n")
    failing.chmod(0o755)
    anew.setenv("CC", str(failing))
    anew.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert choice.describe(torch.device("cpu")).endswith("run instead (no space left)")
    assert [x.name for x in (tmp_path / "cache" / "dsv3_mtp").iterdir()] == [".lock"]


def test_a_library_that_was_damaged_or_lies_open_to_others_is_not_loaded(compiled, anew, tmp_path):
    built, compiler = c_library._build(()), tmp_path / "cc"
    # of what it is told it needs `-o FILE`: the library that is there already
    compiler.write_text(f'#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done\ncp {built} "$2"\n')
    compiler.chmod(0o755)
    anew.setenv("XDG_CACHE_HOME", str(tmp_path))
    anew.setenv("CC", str(compiler))
    assert c_library.unavailable(torch.float32) is None
    cache = tmp_path / "dsv3_mtp"
    [library] = cache.glob("*.so")
    assert cache.stat().st_mode & 0o777 == 0o700
    content = library.read_bytes()
    library.unlink()  # not in place: this process still runs it
    library.write_bytes(content[: len(content) // 2])
    library.chmod(0o700)
    c_library._library.cache_clear()
    assert "was damaged and is deleted" in str(c_library.unavailable(torch.float32))
    c_library._library.cache_clear()
    assert c_library.unavailable(torch.float32) is None  # built again
    cache.chmod(0o777)
    c_library._library.cache_clear()
    assert "others may write it" in str(c_library.unavailable(torch.float32))
