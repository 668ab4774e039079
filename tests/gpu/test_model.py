"""The model on a GPU: the numbers of the CPU in float32, those of float64 within rounding in
bfloat16, no waiting.
"""

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from dsv3_mtp.config import Config
from dsv3_mtp.decode.generate import Settings, generate
from dsv3_mtp.model.causal_lm import DeepseekV3MTP
from dsv3_mtp.model.output import LossSettings
from dsv3_mtp.ops.attention import sdpa
from dsv3_mtp.ops.experts import grouped_kernel, routed
from tests.decode.plain import CYCLE, HEADS, train_on_cycle
from tests.ops.test_recompute import build

CUDA = torch.device("cuda")
# Widths that every kernel takes, FP8 and fused attention included.
WIDE = {
    "model.hidden_size": 128,
    "model.intermediate_size": 256,
    "model.moe_intermediate_size": 64,
    "model.q_lora_rank": 64,
    "model.kv_lora_rank": 64,
    "model.qk_nope_head_dim": 64,
    "model.qk_rope_head_dim": 32,
    "model.v_head_dim": 64,
    "model.max_position_embeddings": 128,
    "data.seq_len": 128,
}


@pytest.fixture(autouse=True)
def no_tf32():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def relative(ours: torch.Tensor, exact: torch.Tensor) -> float:
    ours, exact = (x.detach().double().cpu() for x in (ours, exact))
    return float((ours - exact).norm() / exact.norm())


def on(model: DeepseekV3MTP, device: torch.device, dtype: torch.dtype) -> DeepseekV3MTP:
    """The router biases stay float32, as in training."""
    model = model.to(device, dtype)
    for gate in model.gates():
        gate.e_score_correction_bias = gate.e_score_correction_bias.to(
            torch.promote_types(dtype, torch.float32)
        )
    return model


def losses_and_gradients(
    config: Config, device: torch.device, dtype: torch.dtype, masked: bool
) -> dict[str, torch.Tensor]:
    model, tokens, documents = build(config, "none")
    model = on(model, device, dtype)
    out = model(
        tokens.to(device),
        documents.to(device) if masked else None,
        settings=LossSettings(balance_loss_weight=0.1),
    )
    out.loss.backward()
    found = {"loss": out.loss.detach(), "nll": out.nll_sum, "load": out.load}
    return found | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("masked", [False, True], ids=["packed", "documents"])
@pytest.mark.parametrize("mode", ["sequential", "parallel"])
def test_float32_gives_the_losses_and_gradients_of_the_cpu(make_tiny_config, mode, masked):
    config = make_tiny_config({"mtp.mode": mode, "mtp.num_nextn_predict_layers": 2})
    exact = losses_and_gradients(config, torch.device("cpu"), torch.float64, masked)
    for device in (torch.device("cpu"), CUDA):
        found = losses_and_gradients(config, device, torch.float32, masked)
        assert found.keys() == exact.keys()
        errors = {name: relative(found[name], value) for name, value in exact.items()}
        assert max(errors.values()) < 1e-5, (
            device,
            max(errors, key=lambda name: errors[name]),
            errors,
        )


def test_bfloat16_stays_within_its_rounding_of_float64(make_tiny_config):
    """One rounding is 2^-9 = 2e-3, and the loss averages over tokens; on a CPU the same comparison
    gives 7e-4.
    """
    config, losses = make_tiny_config({**WIDE, "mtp.num_nextn_predict_layers": 2}), []
    for device, dtype in ((torch.device("cpu"), torch.float64), (CUDA, torch.bfloat16)):
        model, tokens, _ = build(config, "none")
        model = on(model.to(torch.bfloat16), device, dtype)  # the same numbers for both
        losses.append(float(model(tokens.to(device)).loss.detach()))
    assert losses[1] == pytest.approx(losses[0], rel=4e-3)


def test_experts_by_one_grouped_kernel_equal_float64_products_of_each(make_tiny_config):
    experts, hidden, width, tokens = 8, 64, 32, 300
    x, gate_up = torch.randn(tokens, hidden), torch.randn(experts, 2 * width, hidden)
    down, gates = torch.randn(experts, hidden, width), torch.rand(tokens, 2)
    # the last expert gets no row
    chosen = torch.stack([torch.randperm(experts - 1)[:2] for _ in range(tokens)])
    x, gate_up, down = (t.bfloat16().to(CUDA).requires_grad_() for t in (x, gate_up, down))
    gates, chosen = gates.to(CUDA).requires_grad_(), chosen.to(CUDA)
    assert grouped_kernel(x, gate_up, down)
    y = routed(x, gates, gate_up, down, chosen, torch.bincount(chosen.flatten(), minlength=experts))
    grad = torch.randn_like(y)
    found = [y, *torch.autograd.grad(y, (x, gates, gate_up, down), grad)]

    a, g, u, d = (t.detach().double().requires_grad_() for t in (x, gates, gate_up, down))
    exact = torch.zeros(tokens, hidden, dtype=torch.float64, device=CUDA)
    for expert in range(experts):
        row, slot = (chosen == expert).nonzero(as_tuple=True)
        gate, up = (a[row] @ u[expert].T).chunk(2, dim=1)
        exact = exact.index_add(
            0, row, (F.silu(gate) * up) @ d[expert].T * g[row, slot].unsqueeze(1)
        )
    wanted = [exact, *torch.autograd.grad(exact, (a, g, u, d), grad.double())]
    for name, ours, theirs in zip(
        ("y", "dx", "dgates", "dgate_up", "ddown"), found, wanted, strict=True
    ):
        assert relative(ours, theirs) < 1e-2, name
    assert not found[3][-1].any() and not found[4][-1].any()


@pytest.mark.parametrize("masked", [False, True], ids=["packed", "documents"])
def test_the_host_never_waits_within_forward_and_backward(make_tiny_config, masked):
    model, _, _ = build(make_tiny_config(WIDE), "none")
    model = on(model, CUDA, torch.bfloat16)
    tokens = torch.randint(64, (2, 128 + 1 + model.depths), device=CUDA)
    documents = (
        torch.arange(tokens.shape[1], device=CUDA).div(50, rounding_mode="floor").expand_as(tokens)
    )
    inputs = tokens, documents if masked else None, None
    settings = LossSettings((0.3,), 1e-4, model.loss.counts(*inputs[:2]))
    for mode in ("default", "default", "error"):  # the first calls load kernels and make workspaces
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode(mode)
        try:
            model(*inputs, settings).loss.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def deterministic(query, key, value, scale, first):
    """Fused kernels add up the gradient of queries in any order."""
    slots = torch.arange(query.shape[2], device=query.device)
    mask = None
    if first is not None:
        mask = ((slots <= slots[:, None]) & (slots >= first[:, :, None])).unsqueeze(1)
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, scale=scale
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", ["selective", "full"])
def test_checkpointing_activations_changes_no_bit(make_tiny_config, mode, dtype):
    results = []
    for used in ("none", mode):
        model, tokens, documents = build(
            make_tiny_config({"mtp.num_nextn_predict_layers": 2}), used, deterministic
        )
        model = on(model, CUDA, dtype)
        out = model(
            tokens.to(CUDA), documents.to(CUDA), settings=LossSettings(balance_loss_weight=0.1)
        )
        out.loss.backward()
        results.append(vars(out) | {name: p.grad for name, p in model.named_parameters()})
    for name, value in results[0].items():
        assert torch.equal(value, results[1][name]), name


def test_no_depth_sees_a_token_beyond_its_horizon(make_tiny_config):
    """Depth k at slot i reads tokens up to t_{i+k}, and does read that one."""
    model, tokens, _ = build(make_tiny_config({"mtp.num_nextn_predict_layers": 2}), "none")
    model, tokens = on(model, CUDA, torch.float64), tokens[:1].to(CUDA)
    with torch.no_grad():
        base = model.logits(tokens)  # (1+D, 1, T, V)
        for position in range(1, tokens.shape[1]):
            changed = tokens.clone()
            changed[0, position] = (tokens[0, position] + 1) % 64
            moved = ((model.logits(changed) - base).abs() > 1e-9).any(-1)[:, 0].cpu()  # (1+D, T)
            for depth in range(3):
                first = position - depth  # the slot whose farthest input is this token
                assert not moved[depth, : max(first, 0)].any(), (depth, position)
                if 0 <= first < 16:
                    assert moved[depth, first], (depth, position)


def test_sdpa_holds_no_square_of_the_sequence():
    """Torch takes its math path in silence where no other kernel fits: (T, T) scores of every
    head.
    """
    length, heads = 2048, 8
    for qk, v in ((192, 128), (96, 64)):
        for dtype in (torch.bfloat16, torch.float32):
            query, key, value = (
                torch.randn(1, heads, length, n, device=CUDA, dtype=dtype, requires_grad=True)
                for n in (qk, qk, v)
            )
            out = sdpa(query, key, value, qk**-0.5, None)  # loads the kernel
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            out = sdpa(query, key, value, qk**-0.5, None)
            out.backward(torch.ones_like(out))
            assert torch.cuda.max_memory_allocated() - before < heads * length * length * 2, (
                qk,
                v,
                dtype,
            )


def test_speculative_decoding_is_greedy_decoding(make_tiny_config):
    config = make_tiny_config({"model.max_position_embeddings": 32, **HEADS["two_modules"]})
    model = DeepseekV3MTP(config.model, config.mtp)
    model.init_weights(0)
    train_on_cycle(model)
    model = model.requires_grad_(False).eval().to(CUDA)
    for prompt in ([5], CYCLE[:7], [60, 1, 2, 3]):
        plain = generate(model, [prompt], Settings())
        assert len(plain.tokens[0]) == 32 - len(prompt)
        for depth in (1, 2, 4):
            drafted = generate(model, [prompt], Settings(draft_depth=depth))
            assert drafted.tokens == plain.tokens, (prompt, depth)
            assert drafted.acceptance.tokens
